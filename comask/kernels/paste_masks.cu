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

constexpr int THREADS = 256;      // launch.py has the same value
constexpr int MAX_CELLS = 56;     // and this one
constexpr int BORDERED = MAX_CELLS + 2;
constexpr int TABLED = 2048;      // pixels of an axis whose places in the mask are tabulated
constexpr int TABLED_ROWS = 256;  // rows of a strip, likewise
constexpr int CHUNK = 16;         // pixels that a thread writes at once

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

// Places of pixels from `first` on along an axis. They are computed in double, which many GPUs have at
// 1/64 of float's rate, so each is computed once a block. Pixels past the table's end are computed anew.
template <int LENGTH> struct Table {
    int first, end;
    float weights[LENGTH + LENGTH / CHUNK];
    unsigned char lows[LENGTH + LENGTH / CHUNK];  // the first cell + 1
};

// Threads that read pixels CHUNK apart find them in different banks of shared memory.
DEVICE int slot(int place) { return place + place / CHUNK; }

// Tabulates the pixels begin..end - 1, which lie on the mask; the caller waits for all threads.
template <int LENGTH>
DEVICE void tabulate(Table<LENGTH> &table, const Axis &axis, int begin, int end) {
    const int length = smaller(end - begin, LENGTH);
    for (int i = LANE; i < length; i += LANES) {
        const Between place = between(axis, begin + i);
        table.weights[slot(i)] = place.weight;
        table.lows[slot(i)] = (unsigned char)(place.low + 1);
    }
    if (LANE == 0) table.first = begin, table.end = begin + length;
}

template <int LENGTH>
DEVICE Between place_of(const Table<LENGTH> &table, const Axis &axis, int pixel) {
    if (pixel >= table.end) return between(axis, pixel);
    const int at = slot(pixel - table.first);
    return {table.lows[at] - 1, table.weights[at]};
}

DEVICE float mix(float from, float to, float weight) { return from + (to - from) * weight; }

// A mask with zeros around it, column by column: cell (row, column) at [column + 1][row + 1].
struct Mask {
    float cells[BORDERED * BORDERED];
    int size, width;             // cells per side; the image in pixels
    float threshold;
    int height;
    Axis x, y;
    int first_column, columns;   // the pixels that lie within half a cell of the box
    int rows[BORDERED + 1];      // the first row of pixels at or past each cell from -1 on
};

// Sets all but the cells, and waits for all threads. Those that have none of `rows` to set leave out the
// divisions in double.
DEVICE void locate(Mask &mask, const float *RESTRICT box, bool found, int size, int height,
                   int width, int x_scale_bits, int y_scale_bits, int threshold_bits) {
    if (LANE <= size + 1) {
        const float x_scale = float_of_bits(x_scale_bits), y_scale = float_of_bits(y_scale_bits);
        const float left = box[0] / x_scale, right = box[2] / x_scale;
        const float top = box[1] / y_scale, bottom = box[3] / y_scale;
        const bool sound = found && is_axis(left, right) && is_axis(top, bottom);
        const Axis x = axis_of(sound ? left : 0.0f, sound ? right : 1.0f, size);
        const Axis y = axis_of(sound ? top : 0.0f, sound ? bottom : 1.0f, size);
        for (int i = LANE; i <= size + 1; i += LANES)
            mask.rows[i] = sound ? first_past(y, i - 1, height) : 0;
        if (LANE == 0) {
            mask.size = size, mask.height = height, mask.width = width;
            mask.threshold = float_of_bits(threshold_bits);
            mask.x = x, mask.y = y;
            mask.first_column = first_past(x, -1, width);
            mask.columns = sound ? first_past(x, size, width) - mask.first_column : 0;
        }
    }
    BARRIER();
}

// Copies the cells; the caller waits for all threads.
DEVICE void copy_cells(Mask &mask, const float *RESTRICT probs) {
    const int size = mask.size, side = size + 2;
    for (int i = LANE; i < side * side; i += LANES) {
        const int column = i / side - 1, row = i % side - 1;
        const bool inside = row >= 0 && row < size && column >= 0 && column < size;
        mask.cells[i] = inside ? probs[row * size + column] : 0.0f;
    }
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

using Rows = Table<TABLED>;

// Tabulates the mask's rows, unless it has so few columns that they ask for fewer; the caller waits.
DEVICE void tabulate_rows(Rows &rows, const Mask &mask) {
    const int begin = mask.rows[0], end = mask.rows[mask.size + 1];
    tabulate(rows, mask.y, begin, mask.columns < (end - begin) / 8 ? begin : end);
}

// Returns the first row of begin..end - 1 whose membership in the mask equals that of the lower end,
// `lower_in`, or `end` if no row's does.
DEVICE int crossing(const Mask &mask, const Rows &rows, float upper, float lower, bool lower_in,
                    int begin, int end) {
    while (begin < end) {
        const int middle = (begin + end) / 2;
        const float weight = place_of(rows, mask.y, middle).weight;
        const bool in = mix(upper, lower, weight) >= mask.threshold;
        if (in == lower_in) end = middle;
        else begin = middle + 1;
    }
    return begin;
}

// Counts the places at which a walk down a column enters or leaves the mask, and writes the first `room`
// of them to `edges`. The walk continues from the bottom of the column before, so the column after the
// mask's last one may have an edge.
DEVICE int walk_column(const Mask &mask, const Rows &rows, int pixel, int *edges, int room) {
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
            const int row =
                upper_in == lower_in
                    ? begin
                    : crossing(mask, rows, upper, lower, lower_in, begin, end);
            if (row > begin) become(upper_in, begin);
            if (row < end) become(lower_in, row);
        }
        upper = lower;
    }
    const int below = mask.rows[mask.size + 1];
    if (below < mask.height) become(false, below);
    return count;
}

// Sets `sums` to the sums of the lanes' values up to each lane's own.
DEVICE void scan(int *sums, int value) {
    sums[LANE] = value;
    BARRIER();
    for (int step = 1; step < LANES; step *= 2) {
        const int before = LANE >= step ? sums[LANE - step] : 0;
        BARRIER();
        sums[LANE] += before;
        BARRIER();
    }
}

// `counts`: [masks], the edges of each mask; then [masks, width], those of a mask up to a column's end.
KERNEL(mask_edge_counts, THREADS, 2)(const float *probs, const float *boxes, const int *found,
                                     int masks, int size, int height, int width, int x_scale_bits,
                                     int y_scale_bits, int threshold_bits, int *counts) {
    SHARED Mask mask;
    SHARED Rows rows;
    SHARED int sums[THREADS];
    for (int m = BLOCK; m < masks; m += BLOCKS) {
        locate(mask, boxes + 4ll * m, m < *found, size, height, width, x_scale_bits, y_scale_bits,
               threshold_bits);
        const int begin = mask.first_column;
        int end = begin, total = 0;
        if (mask.columns > 0) {
            end = smaller(begin + mask.columns + 1, width);
            copy_cells(mask, probs + (long long)m * size * size);
            tabulate_rows(rows, mask);
        }
        BARRIER();
        int *ends = counts + masks + (long long)m * width;
        for (int start = begin; start < end; start += LANES) {
            const int pixel = start + LANE;
            scan(sums, pixel < end ? walk_column(mask, rows, pixel, ends, 0) : 0);
            if (pixel < end) ends[pixel] = total + sums[LANE];
            total += sums[LANES - 1];
            BARRIER();  // all threads have read the sums and, in the end, the mask
        }
        for (int pixel = LANE; pixel < begin; pixel += LANES) ends[pixel] = 0;
        for (int pixel = end + LANE; pixel < width; pixel += LANES) ends[pixel] = total;
        if (LANE == 0) counts[m] = total;
    }
}
HOST_LAUNCH(mask_edge_counts)

// `edges`: the edges of one mask after the other, each mask's in rising order, as column * height + row.
KERNEL(mask_edges, THREADS, 2)(const float *probs, const float *boxes, const int *counts, int masks,
                               int size, int height, int width, int x_scale_bits, int y_scale_bits,
                               int threshold_bits, int capacity, int *edges) {
    SHARED Mask mask;
    SHARED Rows rows;
    SHARED int sums[THREADS];
    for (int m = BLOCK; m < masks; m += BLOCKS) {
        if (counts[m] == 0) continue;  // which also skips the rows without a mask
        BARRIER();  // all threads have read the last mask and its sums
        locate(mask, boxes + 4ll * m, true, size, height, width, x_scale_bits, y_scale_bits,
               threshold_bits);
        copy_cells(mask, probs + (long long)m * size * size);
        tabulate_rows(rows, mask);
        int part = 0;
        for (int before = LANE; before < m; before += LANES) part += counts[before];
        scan(sums, part);  // which waits for all threads
        const int offset = sums[LANES - 1];
        const int *ends = counts + masks + (long long)m * width;
        const int last = smaller(mask.first_column + mask.columns, width - 1);
        for (int pixel = mask.first_column + LANE; pixel <= last; pixel += LANES) {
            const int place = offset + (pixel ? ends[pixel - 1] : 0);
            if (ends[pixel] > (pixel ? ends[pixel - 1] : 0))
                walk_column(mask, rows, pixel, edges + place, capacity - place);
        }
    }
}
HOST_LAUNCH(mask_edges)

struct alignas(CHUNK) Chunk {
    unsigned words[4];
};

// Returns the four lowest bits as the lowest bits of four bytes.
DEVICE unsigned bytes_of(unsigned bits) { return (bits & 15) * 0x00204081u & 0x01010101u; }

// Writes CHUNK pixels from `first` on, one a bit, to an address that is a multiple of CHUNK. The first and
// the last chunk of a bitmap may reach beyond it: there, other masks may have their pixels.
DEVICE void write_chunk(unsigned char *bitmap, int first, int pixels, unsigned bits) {
    if (first >= 0 && pixels - first >= CHUNK) {
        *(Chunk *)(bitmap + first) = {
            {bytes_of(bits), bytes_of(bits >> 4), bytes_of(bits >> 8), bytes_of(bits >> 12)}};
    } else {
        for (int i = larger(0, -first); i < smaller(CHUNK, pixels - first); ++i)
            bitmap[first + i] = bits >> i & 1;
    }
}

// Returns which of CHUNK pixels from `first` on belong to the mask, one a bit, as far as they lie in the
// rows whose pixels are begin..end - 1 and have a place in `rows`.
DEVICE unsigned members(const Mask &mask, const Table<TABLED> &columns,
                        const Table<TABLED_ROWS> &rows, int first, int begin, int end) {
    const int width = mask.width, side = mask.size + 2;
    unsigned bits = 0;
    if (end - first > CHUNK) end = first + CHUNK;
    for (int pixel = larger(first, begin); pixel < end;) {
        const int row = pixel / width, line = row * width;
        const Between y = place_of(rows, mask.y, row);
        const float *cells = mask.cells + y.low + 1;
        const int next = smaller(end, line + width);
        const int last = smaller(next - line, mask.first_column + mask.columns);
        for (int column = larger(pixel - line, mask.first_column); column < last; ++column) {
            const Between x = place_of(columns, mask.x, column);
            const float *left = cells + (x.low + 1) * side, *right = left + side;
            const float upper = mix(left[0], right[0], x.weight);
            const float lower = mix(left[1], right[1], x.weight);
            const bool in = mix(upper, lower, y.weight) >= mask.threshold;
            bits |= (unsigned)in << (line + column - first);
        }
        pixel = next;
    }
    return bits;
}

// `bitmaps`: [masks, height, width], 1 where a pixel belongs to the mask.
//
// A bitmap is a run of bytes, of which each of its `strips` blocks writes a part in aligned chunks. Where
// there is no mask, a thread just stores zeros, at the speed of a memset; a memset before the kernel would
// write the masks' own part twice and be one more launch for each caller to queue.
KERNEL(paste_masks, THREADS, 4)(const float *probs, const float *boxes, const int *found, int masks,
                                int size, int height, int width, int x_scale_bits, int y_scale_bits,
                                int threshold_bits, int strips, unsigned char *bitmaps) {
    SHARED Mask mask;
    SHARED Table<TABLED> columns;
    SHARED Table<TABLED_ROWS> rows;
    const int pixels = height * width;
    for (int block = BLOCK; block < masks * strips; block += BLOCKS) {
        const int m = block / strips, strip = block % strips;
        unsigned char *bitmap = bitmaps + (long long)m * pixels;
        const int outside = (int)((unsigned long long)bitmap % CHUNK);  // bytes of the first chunk
        const long long chunks = ((long long)outside + pixels + CHUNK - 1) / CHUNK;
        const long long begin = chunks * strip / strips, end = chunks * (strip + 1) / strips;
        BARRIER();  // all threads have read the last mask
        locate(mask, boxes + 4ll * m, m < *found, size, height, width, x_scale_bits, y_scale_bits,
               threshold_bits);
        // the mask's rows in this strip
        const int top = larger(mask.rows[0], (int)((CHUNK * begin - outside) / width));
        const int bottom = smaller(mask.rows[size + 1],
                                   (int)((CHUNK * end - outside + width - 1) / width));
        const bool empty = mask.columns == 0 || top >= bottom;
        if (!empty) {
            copy_cells(mask, probs + (long long)m * size * size);
            tabulate(columns, mask.x, mask.first_column, mask.first_column + mask.columns);
            tabulate(rows, mask.y, top, bottom);
            BARRIER();
        }
        for (long long chunk = begin + LANE; chunk < end; chunk += LANES) {
            const int first = (int)(CHUNK * chunk - outside);
            const bool touched = !empty && first < bottom * width && first > top * width - CHUNK;
            write_chunk(bitmap, first, pixels,
                        touched ? members(mask, columns, rows, first, top * width, bottom * width)
                                : 0);
        }
    }
}
HOST_LAUNCH(paste_masks)
