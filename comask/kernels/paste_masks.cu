// Pastes masks, given over boxes, into the image: as bitmaps, or as edges. Edges are the places at which
// a column-major walk over the image enters or leaves a mask; COCO's RLE counts the pixels between them.
//
// A pixel's probability is interpolated bilinearly between the four cells around its centre; outside the
// mask it is zero. comask/masks.py computes it in the same way: positions in double, then in float
//     along x:  upper = a + (b - a) * x_weight,  lower likewise
//     along y:  upper + (lower - upper) * y_weight
// Every rounding is monotonic, so between two rows of cells a column's probability only rises or only
// falls. Its ends therefore show whether it crosses the threshold, and bisection finds the place. Compile
// without contraction of products and sums, and with divisions that are rounded as in IEEE 754.
//
// Boxes are in pixels of a resized image, which has `x_scale` by `y_scale` pixels per pixel of the image.
// They are divided by these scales in float, as in `comask.structures`. Rows from `found` on hold no
// mask; that number is known on the device alone.
//
// The arguments are in the order of TensorRT's AOT plugins: inputs, int32 scalars, output.
#include "portable.h"

constexpr int THREADS = 128;      // launch.py has the same value
constexpr int MAX_CELLS = 56;     // and this one
constexpr int BORDERED = MAX_CELLS + 2;

// The position of a mask's cells along an axis of the image.
struct Axis {
    double start, scale;  // in pixels; cells per pixel
};

DEVICE double cell_at(const Axis &axis, int pixel) {
    return ((double)pixel + 0.5 - axis.start) * axis.scale - 0.5;
}

DEVICE bool is_axis(float start, float stop) {
    const double extent = (double)stop - (double)start;
    return extent > 0.0 && extent < 1e300;  // false for NaN and infinity
}

DEVICE Axis axis_of(float start, float stop, int cells) {
    return {(double)start, (double)cells / ((double)stop - (double)start)};
}

// Returns the first pixel at or past a cell, or `length` if no pixel is.
DEVICE int first_past(const Axis &axis, int cell, int length) {
    const double guess = ((double)cell + 0.5) / axis.scale + axis.start - 0.5;
    int pixel = (int)smaller(larger(guess, 0.0), (double)length);
    while (pixel > 0 && cell_at(axis, pixel - 1) >= (double)cell) --pixel;
    while (pixel < length && cell_at(axis, pixel) < (double)cell) ++pixel;
    return pixel;
}

// The first of the two cells that a pixel lies between, and the weight of the second.
struct Between {
    int low;
    float weight;
};

DEVICE Between between(const Axis &axis, int pixel) {
    const double cell = cell_at(axis, pixel), low = floor(cell);
    return {(int)low, (float)(cell - low)};
}

DEVICE float mix(float from, float to, float weight) { return from + (to - from) * weight; }

// A mask with zeros around it, column by column: cell (row, column) at [column + 1][row + 1].
struct Mask {
    float cells[BORDERED * BORDERED];
    int size, height, width;     // cells per side; the image in pixels
    float threshold;
    Axis x, y;
    int first_column, columns;   // the pixels that lie within half a cell of the box
    int rows[BORDERED + 1];      // the first row of pixels at or past each cell from -1 on
};

DEVICE void load(Mask &mask, const float *RESTRICT probs, const float *RESTRICT box, bool found,
                 int size, int height, int width, int x_scale_bits, int y_scale_bits,
                 int threshold_bits) {
    const float x_scale = float_of_bits(x_scale_bits), y_scale = float_of_bits(y_scale_bits);
    const float left = box[0] / x_scale, right = box[2] / x_scale;
    const float top = box[1] / y_scale, bottom = box[3] / y_scale;
    const bool sound = found && is_axis(left, right) && is_axis(top, bottom);
    const Axis x = axis_of(sound ? left : 0.0f, sound ? right : 1.0f, size);
    const Axis y = axis_of(sound ? top : 0.0f, sound ? bottom : 1.0f, size);
    const int side = size + 2;
    for (int i = LANE; i < side * side; i += LANES) {
        const int column = i / side - 1, row = i % side - 1;
        const bool inside = row >= 0 && row < size && column >= 0 && column < size;
        mask.cells[i] = inside ? probs[row * size + column] : 0.0f;
    }
    for (int i = LANE; i <= size + 1; i += LANES)
        mask.rows[i] = sound ? first_past(y, i - 1, height) : 0;
    if (LANE == 0) {
        mask.size = size, mask.height = height, mask.width = width;
        mask.threshold = float_of_bits(threshold_bits);
        mask.x = x, mask.y = y;
        mask.first_column = first_past(x, -1, width);
        mask.columns = sound ? first_past(x, size, width) - mask.first_column : 0;
    }
    BARRIER();
}

// A column of pixels: the columns of cells around it, from the row above the mask's first one on.
struct Column {
    const float *left, *right;
    float weight;
};

DEVICE Column column_at(const Mask &mask, int pixel) {
    const Between x = between(mask.x, pixel);
    const float *left = mask.cells + (x.low + 1) * (mask.size + 2);
    return {left, left + mask.size + 2, x.weight};
}

DEVICE float row_of(const Column &column, int row) {
    return mix(column.left[row], column.right[row], column.weight);
}

DEVICE bool is_in(const Mask &mask, int row, int pixel) {
    if (row < mask.rows[0] || row >= mask.rows[mask.size + 1]) return false;
    const Column column = column_at(mask, pixel);
    const Between y = between(mask.y, row);
    const float upper = row_of(column, y.low + 1), lower = row_of(column, y.low + 2);
    return mix(upper, lower, y.weight) >= mask.threshold;
}

// Returns the first row of begin..end - 1 whose membership in the mask equals that of the lower end,
// `lower_in`, or `end` if no row's does.
DEVICE int crossing(const Mask &mask, float upper, float lower, bool lower_in, int begin, int end) {
    while (begin < end) {
        const int middle = (begin + end) / 2;
        const bool in = mix(upper, lower, between(mask.y, middle).weight) >= mask.threshold;
        if (in == lower_in) end = middle;
        else begin = middle + 1;
    }
    return begin;
}

// Counts the places at which a walk down a column enters or leaves the mask, and writes the first `room`
// of them to `edges`. The walk continues from the bottom of the column before, so the column after the
// mask's last one may have an edge.
DEVICE int walk_column(const Mask &mask, int pixel, int *edges, int room) {
    const int last = mask.first_column + mask.columns;
    bool in = pixel > mask.first_column && is_in(mask, mask.height - 1, pixel - 1);
    int count = 0;
    const long long top = (long long)pixel * mask.height;
    auto become = [&](bool next, int row) {
        if (next == in) return;
        in = next;
        if (count < room) edges[count] = (int)(top + row);
        ++count;
    };
    if (pixel == last || mask.rows[0] > 0) become(false, 0);
    if (pixel == last) return count;

    const Column column = column_at(mask, pixel);
    float upper = row_of(column, 0);
    for (int i = 0; i <= mask.size; ++i) {
        const int begin = mask.rows[i], end = mask.rows[i + 1];
        const float lower = row_of(column, i + 1);
        const bool upper_in = upper >= mask.threshold;
        const bool lower_in = mix(upper, lower, 1.0f) >= mask.threshold;
        if (begin < end) {
            const int row = upper_in == lower_in ? begin
                                                 : crossing(mask, upper, lower, lower_in, begin, end);
            if (row > begin) become(upper_in, begin);
            if (row < end) become(lower_in, row);
        }
        upper = lower;
    }
    const int below = mask.rows[mask.size + 1];
    if (below < mask.height) become(false, below);
    return count;
}

// `counts`: [masks], the edges of each mask; then [masks, width], those of a mask up to a column's end.
KERNEL(mask_edge_counts, THREADS, 4)(const float *probs, const float *boxes, const int *found,
                                     int masks, int size, int height, int width, int x_scale_bits,
                                     int y_scale_bits, int threshold_bits, int *counts) {
    SHARED Mask mask;
    SHARED int sums[THREADS];
    for (int m = BLOCK; m < masks; m += BLOCKS) {
        load(mask, probs + (long long)m * size * size, boxes + 4ll * m, m < *found, size, height, width,
             x_scale_bits, y_scale_bits, threshold_bits);
        int *ends = counts + masks + (long long)m * width;
        const int first = mask.first_column, last = first + mask.columns;
        int total = 0;
        for (int start = 0; start < width; start += LANES) {
            const int pixel = start + LANE;
            const bool walked = mask.columns > 0 && pixel >= first && pixel <= last && pixel < width;
            sums[LANE] = walked ? walk_column(mask, pixel, ends, 0) : 0;
            BARRIER();
            for (int step = 1; step < LANES; step *= 2) {
                const int before = LANE >= step ? sums[LANE - step] : 0;
                BARRIER();
                sums[LANE] += before;
                BARRIER();
            }
            if (pixel < width) ends[pixel] = total + sums[LANE];
            total += sums[LANES - 1];
            BARRIER();  // all threads have read the sums and, in the end, the mask
        }
        if (LANE == 0) counts[m] = total;
    }
}
HOST_LAUNCH(mask_edge_counts)

// `edges`: the edges of one mask after the other, each mask's in rising order, as column * height + row.
KERNEL(mask_edges, THREADS, 4)(const float *probs, const float *boxes, const int *counts, int masks,
                               int size, int height, int width, int x_scale_bits, int y_scale_bits,
                               int threshold_bits, int capacity, int *edges) {
    SHARED Mask mask;
    for (int m = BLOCK; m < masks; m += BLOCKS) {
        if (counts[m] == 0) continue;  // which also skips the rows without a mask
        BARRIER();  // all threads have read the last mask
        load(mask, probs + (long long)m * size * size, boxes + 4ll * m, true, size, height, width,
             x_scale_bits, y_scale_bits, threshold_bits);
        int offset = 0;
        for (int before = 0; before < m; ++before) offset += counts[before];
        const int *ends = counts + masks + (long long)m * width;
        const int last = smaller(mask.first_column + mask.columns, width - 1);
        for (int pixel = mask.first_column + LANE; pixel <= last; pixel += LANES) {
            const int place = offset + (pixel ? ends[pixel - 1] : 0);
            if (ends[pixel] > (pixel ? ends[pixel - 1] : 0))
                walk_column(mask, pixel, edges + place, capacity - place);
        }
    }
}
HOST_LAUNCH(mask_edges)

// `bitmaps`: [masks, height, width], 1 where a pixel belongs to the mask.
KERNEL(paste_masks, THREADS, 4)(const float *probs, const float *boxes, const int *found, int masks,
                                int size, int height, int width, int x_scale_bits, int y_scale_bits,
                                int threshold_bits, int strips, unsigned char *bitmaps) {
    SHARED Mask mask;
    for (int block = BLOCK; block < masks * strips; block += BLOCKS) {
        const int m = block / strips, strip = block % strips;
        BARRIER();  // all threads have read the last mask
        load(mask, probs + (long long)m * size * size, boxes + 4ll * m, m < *found, size, height, width,
             x_scale_bits, y_scale_bits, threshold_bits);
        const int first = mask.first_column, last = first + mask.columns;
        unsigned char *bitmap = bitmaps + (long long)m * height * width;
        const int begin = (int)((long long)height * strip / strips);
        const int end = (int)((long long)height * (strip + 1) / strips);
        for (int row = begin; row < end; ++row)
            for (int pixel = LANE; pixel < width; pixel += LANES)
                bitmap[(long long)row * width + pixel] =
                    pixel >= first && pixel < last && is_in(mask, row, pixel);
    }
}
HOST_LAUNCH(paste_masks)
