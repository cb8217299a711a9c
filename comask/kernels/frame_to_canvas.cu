// Resizes and pads a frame of video in one pass, which gives the canvas that stage 1 takes.
//
// A block handles a row of the canvas. For each pixel, the four surrounding pixels of the frame are
// converted to u8 RGB and interpolated with the roundings of OpenCV's INTER_LINEAR: positions in double
// are rounded to float, weights are multiples of 2^-11, and two extra bits are kept after the vertical
// sum (opencv, modules/imgproc/src/resize.cpp). So every byte of the canvas equals that of
// comask/preprocess.py.
//
// The arguments are in the order of TensorRT's AOT plugins: inputs, int32 scalars, output.
#include "portable.h"

constexpr int THREADS = 256;          // launch.py has the same value
constexpr int WEIGHT_ONE = 2048;      // 2^11
constexpr int COLOUR_SHIFT = 16;      // fraction bits of the colour matrix; launch.py has the same value

struct Pixel {
    int red, green, blue;
};

// The two pixels of the frame that a pixel of the canvas lies between along an axis, and their weights.
struct Taps {
    int low, high, low_weight, high_weight;
};

DEVICE Taps taps_at(int place, double scale, int length) {
    const float position = (float)(((double)place + 0.5) * scale - 0.5);
    const float floored = floorf(position), high_weight = position - floored;
    const int low = (int)floored;
    return {larger(low, 0), smaller(low + 1, length - 1),
            (int)rintf((1.0f - high_weight) * (float)WEIGHT_ONE),
            (int)rintf(high_weight * (float)WEIGHT_ONE)};
}

DEVICE unsigned char interpolate(int low_low, int low_high, int high_low, int high_high, const Taps &y,
                                 const Taps &x) {
    const int low = low_low * x.low_weight + low_high * x.high_weight;
    const int high = high_low * x.low_weight + high_high * x.high_weight;
    const int sum = (y.low_weight * (low >> 4) >> 16) + (y.high_weight * (high >> 4) >> 16);
    return (unsigned char)((sum + 2) >> 2);
}

// A frame of RGB. `red`, `green` and `blue` are the offsets of a pixel's bytes from its address.
struct RgbFrame {
    const unsigned char *pixels;
    int row_stride, column_stride, red, green, blue;
};

DEVICE Pixel pixel_at(const RgbFrame &frame, int row, int column) {
    const unsigned char *pixel =
        frame.pixels + ((long long)row * frame.row_stride + (long long)column * frame.column_stride);
    return {pixel[frame.red], pixel[frame.green], pixel[frame.blue]};
}

// A frame of a plane of Y and a plane of pairs (U, V), each of which two rows and two columns share.
struct Nv12Frame {
    const unsigned char *luma, *chroma;
    int luma_pitch, chroma_pitch, chroma_height, chroma_width;
    int black, gain, red_v, green_u, green_v, blue_u;
};

DEVICE int level(int value) { return smaller(larger(value >> COLOUR_SHIFT, 0), 255); }

DEVICE Pixel pixel_at(const Nv12Frame &frame, int row, int column) {
    const int chroma_row = smaller(row / 2, frame.chroma_height - 1);
    const int chroma_column = smaller(column / 2, frame.chroma_width - 1);
    const unsigned char *pair =
        frame.chroma + ((long long)chroma_row * frame.chroma_pitch + 2 * chroma_column);
    const int u = pair[0] - 128, v = pair[1] - 128;
    const int luma = frame.luma[(long long)row * frame.luma_pitch + column];
    const int y = (luma - frame.black) * frame.gain + (1 << (COLOUR_SHIFT - 1));
    return {level(y + frame.red_v * v), level(y + frame.green_u * u + frame.green_v * v),
            level(y + frame.blue_u * u)};
}

template <typename Frame>
DEVICE void frame_to_canvas(const Frame &frame, int height, int width, int resized_height,
                            int resized_width, int canvas_height, int canvas_width,
                            unsigned char *RESTRICT canvas) {
    // The inverse of destination / source, as in OpenCV: source / destination may round differently.
    const double scale_y = 1.0 / ((double)resized_height / (double)height);
    const double scale_x = 1.0 / ((double)resized_width / (double)width);
    for (int row = BLOCK; row < canvas_height; row += BLOCKS) {
        const Taps y = taps_at(row, scale_y, height);
        unsigned char *line = canvas + (long long)row * canvas_width * 3;
        for (int column = LANE; column < canvas_width; column += LANES) {
            unsigned char red = 0, green = 0, blue = 0;
            if (row < resized_height && column < resized_width) {
                const Taps x = taps_at(column, scale_x, width);
                const Pixel a = pixel_at(frame, y.low, x.low), b = pixel_at(frame, y.low, x.high);
                const Pixel c = pixel_at(frame, y.high, x.low);
                const Pixel d = pixel_at(frame, y.high, x.high);
                red = interpolate(a.red, b.red, c.red, d.red, y, x);
                green = interpolate(a.green, b.green, c.green, d.green, y, x);
                blue = interpolate(a.blue, b.blue, c.blue, d.blue, y, x);
            }
            line[3 * column] = red;
            line[3 * column + 1] = green;
            line[3 * column + 2] = blue;
        }
    }
}

KERNEL(frame_to_canvas_rgb, THREADS, 4)(
    const unsigned char *pixels, int height, int width, int resized_height, int resized_width,
    int canvas_height, int canvas_width, int row_stride, int column_stride, int red, int green,
    int blue, unsigned char *canvas) {
    const RgbFrame frame = {pixels, row_stride, column_stride, red, green, blue};
    frame_to_canvas(frame, height, width, resized_height, resized_width, canvas_height, canvas_width,
                    canvas);
}
HOST_LAUNCH(frame_to_canvas_rgb)

KERNEL(frame_to_canvas_nv12, THREADS, 4)(
    const unsigned char *luma, const unsigned char *chroma, int height, int width, int resized_height,
    int resized_width, int canvas_height, int canvas_width, int luma_pitch, int chroma_pitch,
    int chroma_height, int chroma_width, int black, int gain, int red_v, int green_u, int green_v,
    int blue_u, unsigned char *canvas) {
    const Nv12Frame frame = {luma, chroma, luma_pitch, chroma_pitch, chroma_height, chroma_width,
                             black, gain, red_v, green_u, green_v, blue_u};
    frame_to_canvas(frame, height, width, resized_height, resized_width, canvas_height, canvas_width,
                    canvas);
}
HOST_LAUNCH(frame_to_canvas_nv12)
