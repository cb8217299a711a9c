// SortedNms: exact greedy non-maximum suppression in rows of boxes sorted by falling score.
//
// A block handles a row in tiles of 32 boxes. Within a tile, a word per box has a bit for each box that
// it suppresses. From these words, every thread derives the boxes of the tile that are kept; then all
// threads suppress later boxes of the row. `keep` always says which boxes are left.
//
// The arguments are in the order of TensorRT's AOT plugins: inputs, int32 scalars, output. Compile
// without contraction of products and sums: the IoU's rounding decides ties at the threshold.
#include "portable.h"

constexpr int TILE = 32;
constexpr int PARTS = TILE / 8;     // a thread computes one byte of a word
constexpr int MAX_THREADS = 1024;   // launch.py has the same value

struct alignas(16) Box {
    float left, top, right, bottom;
};

DEVICE float area_of(Box box) { return (box.right - box.left) * (box.bottom - box.top); }

// Boxes that do not overlap have no IoU above a threshold ≥ 0. The others have a union above 0, or NaN,
// which exceeds no threshold.
DEVICE bool overlap(Box a, float area_a, Box b, float area_b, float threshold) {
    const float width = smaller(a.right, b.right) - larger(a.left, b.left);
    const float height = smaller(a.bottom, b.bottom) - larger(a.top, b.top);
    if (!(width > 0.0f && height > 0.0f)) return false;
    const float intersection = width * height;
    return intersection / (area_a + area_b - intersection) > threshold;
}

DEVICE void suppress_row(const Box *RESTRICT boxes, const int *RESTRICT groups, int count,
                         float threshold, unsigned char *keep) {
    SHARED Box tile[TILE];
    SHARED float areas[TILE];
    SHARED int tile_groups[TILE];
    SHARED unsigned char alive[TILE], strikes[TILE][PARTS];
    for (int i = LANE; i < count; i += LANES) keep[i] = 1;

    for (int first = 0; first < count; first += TILE) {
        const int size = smaller(TILE, count - first);
        BARRIER();  // all threads have written `keep` and read the last tile
        for (int i = LANE; i < size; i += LANES) {
            tile[i] = boxes[first + i];
            areas[i] = area_of(tile[i]);
            tile_groups[i] = groups[first + i];
            alive[i] = keep[first + i];
        }
        BARRIER();
        for (int work = LANE; work < size * PARTS; work += LANES) {
            const int i = work / PARTS, part = work % PARTS;
            unsigned bits = 0;
            for (int j = larger(part * 8, i + 1); j < smaller(part * 8 + 8, size); ++j)
                if (tile_groups[i] == tile_groups[j] &&
                    overlap(tile[i], areas[i], tile[j], areas[j], threshold))
                    bits |= 1u << (j - part * 8);
            strikes[i][part] = (unsigned char)bits;
        }
        BARRIER();
        unsigned kept = 0;
        for (int i = 0; i < size; ++i) kept |= (unsigned)alive[i] << i;
        for (int i = 0; i < size; ++i) {
            unsigned struck = 0;
            for (int part = 0; part < PARTS; ++part) struck |= (unsigned)strikes[i][part] << (part * 8);
            if (kept >> i & 1) kept &= ~struck;
        }
        for (int i = LANE; i < size; i += LANES) keep[first + i] = kept >> i & 1;
        for (int j = first + TILE + LANE; j < count; j += LANES) {
            if (!keep[j]) continue;
            const Box box = boxes[j];
            const float area = area_of(box);
            const int group = groups[j];
            for (int i = 0; i < size; ++i)
                if ((kept >> i & 1) && tile_groups[i] == group &&
                    overlap(tile[i], areas[i], box, area, threshold)) {
                    keep[j] = 0;
                    break;
                }
        }
    }
}

KERNEL(sorted_nms, MAX_THREADS, 1)(const float *boxes, const int *group_ids, int rows, int count,
                                int iou_threshold_bits, unsigned char *keep) {
    const float threshold = float_of_bits(iou_threshold_bits);
    for (int row = BLOCK; row < rows; row += BLOCKS) {
        const long long start = (long long)row * count;
        suppress_row((const Box *)boxes + start, group_ids + start, count, threshold, keep + start);
    }
}
HOST_LAUNCH(sorted_nms)
