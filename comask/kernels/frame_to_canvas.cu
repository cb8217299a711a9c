// Resizes and pads a frame of video in one pass, which gives the canvas that stage 1 takes.
//
// For each pixel of the canvas, the four surrounding pixels of the frame are converted to u8 RGB and
// interpolated with the roundings of OpenCV's INTER_LINEAR: positions in double are rounded to float,
// weights are multiples of 2^-11, and two extra bits are kept after the vertical sum (opencv,
// modules/imgproc/src/resize.cpp). So every byte of the canvas equals that of comask/preprocess.py.
//
// A block handles a tile of the canvas. It tabulates the positions of the tile's columns and rows, since
// many GPUs have double at 1/64 of float's rate. A thread then makes GROUP neighbouring pixels, which it
// writes in words of 4 bytes where the canvas' addresses allow it. The scales come from launch.py: a
// division in double takes more than all else that a thread does in double.
//
// The arguments are in the order of TensorRT's AOT plugins: inputs, int32 scalars, output.
#include "portable.h"

constexpr int THREADS = 256;          // launch.py has the same value
constexpr int TILE_COLUMNS = 128;     // and these two
constexpr int TILE_ROWS = 16;
constexpr int GROUP = 4;              // neighbouring pixels that a thread makes
constexpr int GROUPS = TILE_COLUMNS / GROUP;
constexpr int WEIGHT_ONE = 2048;      // 2^11
constexpr int COLOUR_SHIFT = 16;      // fraction bits of the colour matrix; launch.py has the same value

struct Pixel {
    int red, green, blue;
};

// The two pixels of the frame that a pixel of the canvas lies between along an axis, and their weights.
struct alignas(16) Taps {
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

DEVICE unsigned interpolate(int low_low, int low_high, int high_low, int high_high, const Taps &y,
                            const Taps &x) {
    const int low = low_low * x.low_weight + low_high * x.high_weight;
    const int high = high_low * x.low_weight + high_high * x.high_weight;
    const int sum = (y.low_weight * (low >> 4) >> 16) + (y.high_weight * (high >> 4) >> 16);
    return (unsigned)((sum + 2) >> 2) & 255;
}

// A frame of RGB. `red`, `green` and `blue` are the offsets of a pixel's bytes from its address.
struct RgbFrame {
    const unsigned char *pixels;
    int row_stride, column_stride, red, green, blue;
};

// What the pixels of a row share.
struct RgbRow {
    const unsigned char *pixels;
};

DEVICE RgbRow row_at(const RgbFrame &frame, int row) {
    return {frame.pixels + (long long)row * frame.row_stride};
}

DEVICE Pixel pixel_at(const RgbFrame &frame, const RgbRow &row, int column) {
    const unsigned char *pixel = row.pixels + (long long)column * frame.column_stride;
    return {pixel[frame.red], pixel[frame.green], pixel[frame.blue]};
}

// A frame of a plane of Y and a plane of pairs (U, V), each of which two rows and two columns share.
// EVEN: all pairs lie at even addresses, so that one load gives both.
template <bool EVEN> struct Nv12Frame {
    const unsigned char *luma, *chroma;
    int luma_pitch, chroma_pitch, chroma_height, chroma_width;
    int black, gain, red_v, green_u, green_v, blue_u;
};

struct Nv12Row {
    const unsigned char *luma, *chroma;
};

template <bool EVEN> DEVICE Nv12Row row_at(const Nv12Frame<EVEN> &frame, int row) {
    const int chroma_row = smaller(row / 2, frame.chroma_height - 1);
    return {frame.luma + (long long)row * frame.luma_pitch,
            frame.chroma + (long long)chroma_row * frame.chroma_pitch};
}

DEVICE int level(int value) { return smaller(larger(value >> COLOUR_SHIFT, 0), 255); }

template <bool EVEN>
DEVICE Pixel pixel_at(const Nv12Frame<EVEN> &frame, const Nv12Row &row, int column) {
    const unsigned char *pair = row.chroma + 2 * smaller(column / 2, frame.chroma_width - 1);
    const int both = EVEN ? *(const unsigned short *)pair : pair[0] | pair[1] << 8;
    const int u = (both & 255) - 128, v = (both >> 8) - 128;
    const int y = (row.luma[column] - frame.black) * frame.gain + (1 << (COLOUR_SHIFT - 1));
    return {level(y + frame.red_v * v), level(y + frame.green_u * u + frame.green_v * v),
            level(y + frame.blue_u * u)};
}

// Returns a pixel of the canvas: 2^16 × blue + 2^8 × green + red.
template <typename Frame, typename Row>
DEVICE unsigned resized_at(const Frame &frame, const Row &low, const Row &high, const Taps &y,
                           const Taps &x) {
    const Pixel a = pixel_at(frame, low, x.low), b = pixel_at(frame, low, x.high);
    const Pixel c = pixel_at(frame, high, x.low), d = pixel_at(frame, high, x.high);
    return interpolate(a.red, b.red, c.red, d.red, y, x) |
           interpolate(a.green, b.green, c.green, d.green, y, x) << 8 |
           interpolate(a.blue, b.blue, c.blue, d.blue, y, x) << 16;
}

// Writes the first `count` of a group's pixels.
DEVICE void write_group(unsigned char *place, const unsigned (&pixels)[GROUP], int count) {
    const unsigned a = pixels[0], b = pixels[1], c = pixels[2], d = pixels[3];
    if (count == GROUP && (unsigned long long)place % 4 == 0) {
        unsigned *words = (unsigned *)place;
        words[0] = a | b << 24;
        words[1] = b >> 8 | c << 16;
        words[2] = c >> 16 | d << 8;
    } else {
#pragma unroll
        for (int i = 0; i < GROUP; ++i)
            for (int j = 0; j < 3; ++j)
                if (i < count) place[3 * i + j] = (unsigned char)(pixels[i] >> 8 * j);
    }
}

// Sizes in pixels, and pixels of the frame per pixel of the canvas.
struct Resize {
    int height, width, resized_height, resized_width, canvas_height, canvas_width;
    double y_scale, x_scale;
};

template <typename Frame>
DEVICE void frame_to_canvas(const Frame &frame, const Resize &to, unsigned char *RESTRICT canvas) {
    SHARED Taps columns[TILE_COLUMNS];  // column c at [c % GROUP * GROUPS + c / GROUP]: without conflicts
    SHARED Taps rows[TILE_ROWS];
    const int across = (to.canvas_width + TILE_COLUMNS - 1) / TILE_COLUMNS;
    const int tiles = (to.canvas_height + TILE_ROWS - 1) / TILE_ROWS * across;
    for (int tile = BLOCK; tile < tiles; tile += BLOCKS) {
        const int top = tile / across * TILE_ROWS, left = tile % across * TILE_COLUMNS;
        BARRIER();  // all threads have read the last tile's tables
        for (int i = LANE; i < TILE_COLUMNS; i += LANES)
            columns[i % GROUP * GROUPS + i / GROUP] = taps_at(left + i, to.x_scale, to.width);
        for (int i = LANE; i < TILE_ROWS; i += LANES) rows[i] = taps_at(top + i, to.y_scale, to.height);
        BARRIER();
        for (int i = LANE; i < TILE_ROWS * GROUPS; i += LANES) {
            const int row = top + i / GROUPS, column = left + i % GROUPS * GROUP;
            if (row >= to.canvas_height || column >= to.canvas_width) continue;
            unsigned pixels[GROUP] = {};
            if (row < to.resized_height && column < to.resized_width) {
                const Taps y = rows[i / GROUPS];
                const auto low = row_at(frame, y.low), high = row_at(frame, y.high);
#pragma unroll
                for (int j = 0; j < GROUP; ++j)
                    if (column + j < to.resized_width)
                        pixels[j] =
                            resized_at(frame, low, high, y, columns[j * GROUPS + i % GROUPS]);
            }
            write_group(canvas + ((long long)row * to.canvas_width + column) * 3, pixels,
                        smaller(GROUP, to.canvas_width - column));
        }
    }
}

// A scale is a double in two int32.
KERNEL(frame_to_canvas_rgb, THREADS, 3)(
    const unsigned char *pixels, int height, int width, int resized_height, int resized_width,
    int canvas_height, int canvas_width, int y_scale_low, int y_scale_high, int x_scale_low,
    int x_scale_high, int row_stride, int column_stride, int red, int green, int blue,
    unsigned char *canvas) {
    const Resize to = {height, width, resized_height, resized_width, canvas_height, canvas_width,
                       double_of_bits(y_scale_low, y_scale_high),
                       double_of_bits(x_scale_low, x_scale_high)};
    frame_to_canvas(RgbFrame{pixels, row_stride, column_stride, red, green, blue}, to, canvas);
}
HOST_LAUNCH(frame_to_canvas_rgb)

KERNEL(frame_to_canvas_nv12, THREADS, 4)(
    const unsigned char *luma, const unsigned char *chroma, int height, int width,
    int resized_height, int resized_width, int canvas_height, int canvas_width, int y_scale_low,
    int y_scale_high, int x_scale_low, int x_scale_high, int luma_pitch, int chroma_pitch,
    int chroma_height, int chroma_width, int black, int gain, int red_v, int green_u, int green_v,
    int blue_u, unsigned char *canvas) {
    const Resize to = {height, width, resized_height, resized_width, canvas_height, canvas_width,
                       double_of_bits(y_scale_low, y_scale_high),
                       double_of_bits(x_scale_low, x_scale_high)};
    if (((unsigned long long)chroma | (unsigned)chroma_pitch) % 2 == 0)
        frame_to_canvas(Nv12Frame<true>{luma, chroma, luma_pitch, chroma_pitch, chroma_height,
                                        chroma_width, black, gain, red_v, green_u, green_v, blue_u},
                        to, canvas);
    else
        frame_to_canvas(Nv12Frame<false>{luma, chroma, luma_pitch, chroma_pitch, chroma_height,
                                         chroma_width, black, gain, red_v, green_u, green_v, blue_u},
                        to, canvas);
}
HOST_LAUNCH(frame_to_canvas_nv12)
