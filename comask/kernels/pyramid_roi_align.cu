// PyramidRoiAlign: RoIAlign (He et al., Mask R-CNN, section 3; half-pixel aligned, averaged samples)
// of each RoI from the level of the pyramid that fits it (Lin et al., FPN, equation 1).
//
// The arguments are in the order of TensorRT's AOT plugins: inputs, int32 scalars, output. Maps of T are
// [B, C, H, W] or, channels-last, [B, H, W, channel_stride]; the output has the same layout, with RoIs in
// the place of images. Geometry and sums are f32. Compile without contraction of products and sums, so
// that coordinates are rounded as in torchvision: rounding decides whether a sample is inside a map.
//
// A block handles one RoI and CHANNEL_BYTES of channels. Bilinear sampling is separable: the block
// tabulates the two pixels and weights of each sample along each axis. Then each thread sums one bin of
// one channel or, channels-last, of one 16-byte vector of channels.
#include "portable.h"

// launch.py has the same three values.
constexpr int MAX_SAMPLES = 128;    // bins × samples per bin, along one axis
constexpr int CHANNEL_BYTES = 256;  // bytes of one pixel's channels per block
constexpr int THREADS = 128;

// A RoI leaves level k for k + 1 where its side reaches canonical_size × 2^(k - 4 - 1e-6). These are
// LEVEL_FACTORS of comask/models/roi_align.py.
constexpr float LEAVES_P2 = 0.499999642f, LEAVES_P3 = 0.999999285f, LEAVES_P4 = 1.99999857f;

template <typename T> struct Maps {
    const T *level[4];
};

struct Geometry {
    int heights[4], widths[4];
    int batch, channels, channel_stride;
    int rois, rois_per_image, bins, ratio;
    float canonical_size;
};

// The two pixels along one axis that a sample lies between, and their weights: 0 outside the map.
struct alignas(16) Sample {
    int low, high;
    float low_weight, high_weight;
};

template <typename T, int V> struct alignas(sizeof(T) * V) Pack {
    T at[V];
};

// Three indices, the last of which runs fastest, that advance in steps: carries cost less than divisions.
struct Odometer {
    int first, second, third;
    int first_step, second_step, third_step;
    int seconds, thirds;
};

DEVICE Odometer odometer(int start, int step, int seconds, int thirds) {
    const int inner = seconds * thirds;
    return {start / inner, start % inner / thirds, start % thirds,
            step / inner, step % inner / thirds, step % thirds, seconds, thirds};
}

DEVICE void advance(Odometer &place) {
    place.third += place.third_step;
    place.second += place.second_step;
    place.first += place.first_step;
    if (place.third >= place.thirds) place.third -= place.thirds, ++place.second;
    if (place.second >= place.seconds) place.second -= place.seconds, ++place.first;
}

// Returns values[level]. That expression itself would make the compiler spill the array to local memory,
// and lose track of the pointers' address space.
template <typename T> DEVICE T of_level(const T (&values)[4], int level) {
    return level == 0 ? values[0] : level == 1 ? values[1] : level == 2 ? values[2] : values[3];
}

// Returns 0 for P2 to 3 for P5; a RoI without area, or with NaN, takes P2.
DEVICE int roi_level(const float *box, float canonical_size) {
    const float width = larger(box[2] - box[0], 0.0f), height = larger(box[3] - box[1], 0.0f);
    const float side = sqrtf(width * height);
    return (side >= LEAVES_P2 * canonical_size) + (side >= LEAVES_P3 * canonical_size) +
           (side >= LEAVES_P4 * canonical_size);
}

// Tabulates the samples between `start` and `end`, in pixels of a map with `length` pixels on this axis.
// A position of NaN is outside the map.
DEVICE void tabulate(Sample *table, float start, float end, int length, int bins, int ratio) {
    const float bin_size = (end - start) / (float)bins;
    for (int i = LANE; i < bins * ratio; i += LANES) {
        const int bin = i / ratio, sample = i % ratio;
        const float share = ((float)sample + 0.5f) * bin_size / (float)ratio;
        const float position = start + (float)bin * bin_size + share;
        Sample entry = {0, 0, 0.0f, 0.0f};
        if (position >= -1.0f && position <= (float)length) {
            const float clamped = smaller(larger(position, 0.0f), (float)(length - 1));
            entry.low = (int)clamped;
            entry.high = smaller(entry.low + 1, length - 1);
            entry.high_weight = (clamped - (float)entry.low) / (float)ratio;
            entry.low_weight = (1.0f - (clamped - (float)entry.low)) / (float)ratio;
        }
        table[i] = entry;
    }
}

// Computes the mean of a bin's samples for V channels from `origin` on. RATIO is the number of samples
// along each axis; with 0, `any_ratio` is.
template <typename T, int V, int RATIO>
DEVICE void sum_bin(float *sum, const T *RESTRICT origin, long long row_step, int column_step,
                    const Sample *along_y, const Sample *along_x, int any_ratio) {
    [[maybe_unused]] constexpr int UNROLLED = RATIO ? RATIO : 1;  // more would exhaust the registers
    const int ratio = RATIO ? RATIO : any_ratio;
    for (int v = 0; v < V; ++v) sum[v] = 0.0f;
#pragma unroll(UNROLLED)
    for (int i = 0; i < ratio; ++i) {
        const Sample y = along_y[i];
        const T *low_row = origin + y.low * row_step, *high_row = origin + y.high * row_step;
        float low_sum[V] = {}, high_sum[V] = {};
#pragma unroll(UNROLLED)
        for (int j = 0; j < ratio; ++j) {
            const Sample x = along_x[j];
            const auto low_low = *(const Pack<T, V> *)(low_row + x.low * column_step);
            const auto low_high = *(const Pack<T, V> *)(low_row + x.high * column_step);
            const auto high_low = *(const Pack<T, V> *)(high_row + x.low * column_step);
            const auto high_high = *(const Pack<T, V> *)(high_row + x.high * column_step);
            for (int v = 0; v < V; ++v) {
                low_sum[v] = multiply_add(x.low_weight, to_float(low_low.at[v]), low_sum[v]);
                low_sum[v] = multiply_add(x.high_weight, to_float(low_high.at[v]), low_sum[v]);
                high_sum[v] = multiply_add(x.low_weight, to_float(high_low.at[v]), high_sum[v]);
                high_sum[v] = multiply_add(x.high_weight, to_float(high_high.at[v]), high_sum[v]);
            }
        }
        for (int v = 0; v < V; ++v) {
            sum[v] = multiply_add(y.low_weight, low_sum[v], sum[v]);
            sum[v] = multiply_add(y.high_weight, high_sum[v], sum[v]);
        }
    }
}

// Pools `count` channels of one RoI.
template <typename T, int RATIO>
DEVICE void pool_planes(T *RESTRICT output, const T *RESTRICT planes, int height, int width,
                        int count, const Sample *along_y, const Sample *along_x, int bins,
                        int any_ratio) {
    const int ratio = RATIO ? RATIO : any_ratio;
    const long long plane = (long long)height * width;
    const int items = count * bins * bins;
    Odometer at = odometer(LANE, LANES, bins, bins);  // channel, row, column
    for (int item = LANE; item < items; item += LANES, advance(at)) {
        float sum;
        sum_bin<T, 1, RATIO>(&sum, planes + at.first * plane, width, 1,
                             along_y + at.second * ratio, along_x + at.third * ratio, ratio);
        store(output + item, sum);
    }
}

// Does the same for channels-last maps; channels from `channels` on are padding and become 0.
template <typename T, int V, int RATIO>
DEVICE void pool_pixels(T *RESTRICT output, const T *RESTRICT pixels, int width, int stride,
                        int count, int channels, const Sample *along_y, const Sample *along_x,
                        int bins, int any_ratio) {
    const int ratio = RATIO ? RATIO : any_ratio;
    const int vectors = count / V, items = bins * bins * vectors;
    Odometer at = odometer(LANE, LANES, bins, vectors);  // row, column, vector of channels
    for (int item = LANE; item < items; item += LANES, advance(at)) {
        const int channel = at.third * V;
        float sum[V];
        sum_bin<T, V, RATIO>(sum, pixels + channel, (long long)width * stride, stride,
                             along_y + at.first * ratio, along_x + at.second * ratio, ratio);
        Pack<T, V> result;
        for (int v = 0; v < V; ++v) store(&result.at[v], channel + v < channels ? sum[v] : 0.0f);
        *(Pack<T, V> *)(output + (long long)(at.first * bins + at.second) * stride + channel) = result;
    }
}

template <typename T, bool CHANNELS_LAST>
DEVICE void pyramid_roi_align(Maps<T> maps, const float *RESTRICT rois, T *RESTRICT output,
                              const Geometry &g) {
    constexpr int V = 16 / sizeof(T), TILE = CHANNEL_BYTES / sizeof(T);
    SHARED Sample along_x[MAX_SAMPLES], along_y[MAX_SAMPLES];
    size_t addresses = (size_t)output;
    for (int k = 0; k < 4; ++k) addresses |= (size_t)maps.level[k];
    const bool in_vectors = g.channel_stride % V == 0 && addresses % 16 == 0;
    const int stored = CHANNELS_LAST ? g.channel_stride : g.channels;
    const int tiles = (stored + TILE - 1) / TILE;

    for (int block = BLOCK; block < g.rois * tiles; block += BLOCKS) {
        // A tile's RoIs precede the next tile, so that the parts of a map they share stay in the cache.
        const int roi = block % g.rois, first = block / g.rois * TILE;
        const int count = smaller(TILE, stored - first);
        const float *box = rois + (g.rois_per_image ? 4ll : 5ll) * roi;
        int image = g.rois_per_image ? roi / g.rois_per_image : 0;
        float nowhere = 0.0f;
        if (!g.rois_per_image) {
            const float named = *box++;
            const bool known = named >= 0.0f && named < (float)g.batch;
            image = known ? (int)named : 0;
            nowhere = known ? 0.0f : float_of_bits(0x7fc00000);  // NaN moves it outside the map
        }
        const int level = roi_level(box, g.canonical_size);
        const int height = of_level(g.heights, level), width = of_level(g.widths, level);
        const float scale = 0.25f / (float)(1 << level);
        BARRIER();  // all threads have read the last RoI's tables
        tabulate(along_x, box[0] * scale - 0.5f + nowhere, box[2] * scale - 0.5f, width, g.bins,
                 g.ratio);
        tabulate(along_y, box[1] * scale - 0.5f, box[3] * scale - 0.5f, height, g.bins, g.ratio);
        BARRIER();

        const long long area = (long long)height * width, bins = g.bins * g.bins;
        if constexpr (CHANNELS_LAST) {
            const T *pixels = of_level(maps.level, level) + image * area * stored + first;
            T *pooled = output + roi * bins * stored + first;
            const int channels = g.channels - first;
#define POOL(V, RATIO)                                                                           \
    pool_pixels<T, V, RATIO>(pooled, pixels, width, stored, count, channels, along_y, along_x, \
                             g.bins, g.ratio)
            if (in_vectors && g.ratio == 2) POOL(V, 2);
            else if (in_vectors) POOL(V, 0);
            else POOL(1, 0);
#undef POOL
        } else {
            const T *planes = of_level(maps.level, level) + (image * (long long)stored + first) * area;
            T *pooled = output + (roi * (long long)stored + first) * bins;
#define POOL(RATIO)                                                                            \
    pool_planes<T, RATIO>(pooled, planes, height, width, count, along_y, along_x, g.bins, g.ratio)
            if (g.ratio == 2) POOL(2);
            else POOL(0);
#undef POOL
        }
    }
}

#define ENTRY(name, T, CHANNELS_LAST)                                                              \
    KERNEL(name, THREADS, 4)(                                                                      \
        const T *p2, const T *p3, const T *p4, const T *p5, const float *rois, int batch,          \
        int channels, int channel_stride, int height2, int width2, int height3, int width3,        \
        int height4, int width4, int height5, int width5, int num_rois, int rois_per_image,        \
        int output_size, int sampling_ratio, int canonical_size_bits, T *output) {                 \
        const Geometry geometry = {{height2, height3, height4, height5},                           \
                                   {width2, width3, width4, width5},                               \
                                   batch, channels, channel_stride, num_rois, rois_per_image,      \
                                   output_size, sampling_ratio, float_of_bits(canonical_size_bits)}; \
        pyramid_roi_align<T, CHANNELS_LAST>({{p2, p3, p4, p5}}, rois, output, geometry);           \
    }                                                                                              \
    HOST_LAUNCH(name)

ENTRY(pyramid_roi_align_f32_planes, float, false)
ENTRY(pyramid_roi_align_f16_planes, unsigned short, false)
ENTRY(pyramid_roi_align_f32_channels_last, float, true)
ENTRY(pyramid_roi_align_f16_channels_last, unsigned short, true)
