// SortedNms: exact greedy non-maximum suppression in rows of boxes sorted by falling score.
//
// There are two ways to compute it. `sorted_nms` does it in one launch with a block for a row, and never
// compares a box with a suppressed one; this takes least work, so it is for CPUs. `nms_overlaps` compares
// all boxes on all multiprocessors of a GPU, and `nms_keep` then goes through each row with one block.
// All of them cut a row into tiles of 32 boxes.
//
// The arguments are in the order of TensorRT's AOT plugins: inputs, int32 scalars, output. Compile
// without contraction of products and sums: the IoU's rounding decides ties at the threshold.
#include "portable.h"

constexpr int TILE = 32;
constexpr int PARTS = TILE / 8;     // a thread of sorted_nms computes one byte of a word
// launch.py has the same values.
constexpr int MAX_THREADS = 1024;
constexpr int KEEP_THREADS = 256;
constexpr int MAX_BOXES = 8192;     // per row, of nms_keep
constexpr int AHEAD = 4;            // words that a thread of nms_keep loads before it needs them

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

// Within a tile, a word per box has a bit for each box that it suppresses. From these words, every thread
// derives the boxes of the tile that are kept; then all threads suppress later boxes of the row. `keep`
// always says which boxes are left.
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

// Bit i of words[row][tile][j] says that box i of the tile would suppress box j, which comes after it.
// Tiles after that of box j are left out. A block compares the boxes of two tiles, a thread one box of the
// later tile with all of the earlier one.
KERNEL(nms_overlaps, TILE, 16)(const float *boxes, const int *group_ids, int rows, int count,
                               int iou_threshold_bits, unsigned *words) {
    SHARED Box tile[TILE];
    SHARED float areas[TILE];
    SHARED int groups[TILE];
    const float threshold = float_of_bits(iou_threshold_bits);
    const unsigned tiles = (count + TILE - 1) / TILE, pairs = tiles * (tiles + 1) / 2;
    for (unsigned work = BLOCK; work < rows * pairs; work += BLOCKS) {
        const int row = work / pairs;
        // The first tile meets all of them and the last one only itself, which are tiles + 1 pairs together;
        // and so are those of the second tile and the second last.
        const int turn = work % pairs / (tiles + 1), place = work % pairs % (tiles + 1);
        const bool turned = turn + place >= tiles;
        const int earlier = turned ? tiles - 1 - turn : turn;
        const int later = turned ? place - 1 : turn + place;
        const Box *row_boxes = (const Box *)boxes + (long long)row * count;
        const int *row_groups = group_ids + (long long)row * count;
        unsigned *row_words = words + ((long long)row * tiles + earlier) * count;

        const int first = earlier * TILE;
        BARRIER();  // all threads have read the last tile
        for (int i = LANE; i < smaller(TILE, count - first); i += LANES) {
            tile[i] = row_boxes[first + i];
            areas[i] = area_of(tile[i]);
            groups[i] = row_groups[first + i];
        }
        BARRIER();
        for (int j = later * TILE + LANE; j < smaller(later * TILE + TILE, count); j += LANES) {
            const Box box = row_boxes[j];
            const float area = area_of(box);
            const int group = row_groups[j];
            unsigned word = 0;
            for (int i = 0; i < smaller(TILE, j - first); ++i)
                if (groups[i] == group && overlap(tile[i], areas[i], box, area, threshold))
                    word |= 1u << i;
            row_words[j] = word;
        }
    }
}
HOST_LAUNCH(nms_overlaps)

// Goes through the tiles of a row. `against` has the words of each box and its own tile, so that every
// thread finds the boxes of a tile that are kept. A box that a box of another tile suppresses has GONE in
// place of its word. That is the bit of the tile's last box, which suppresses none of the tile, and which
// is in `kept` until all others are done.
DEVICE void keep_row(const unsigned *RESTRICT words, int count, unsigned char *RESTRICT keep) {
    constexpr unsigned GONE = 1u << (TILE - 1);
    alignas(16) SHARED unsigned against[MAX_BOXES];
    BARRIER();  // all threads are done with the last row
    for (int i = LANE; i < (count + TILE - 1) / TILE * TILE; i += LANES)
        against[i] = i < count ? words[(long long)(i / TILE) * count + i] : GONE;

    for (int first = 0; first < count; first += TILE, words += count) {
        // The loads take as long as the choice of the boxes, so they begin before it.
        const int next = first + TILE + LANE;
        unsigned ahead[AHEAD];
        for (int n = 0; n < AHEAD; ++n)
            ahead[n] = next + n * LANES < count ? words[next + n * LANES] : 0;
        BARRIER();  // the tile's words are final
        unsigned kept = ~0u;  // or not yet looked at
        for (int i = 0; i < TILE; ++i)
            if (against[first + i] & kept) kept &= ~(1u << i);
        for (int i = LANE; i < smaller(TILE, count - first); i += LANES) keep[first + i] = kept >> i & 1;
        for (int n = 0; n < AHEAD; ++n)
            if (ahead[n] & kept) against[next + n * LANES] = GONE;
        for (int j = next + AHEAD * LANES; j < count; j += LANES)
            if (words[j] & kept) against[j] = GONE;
    }
}

KERNEL(nms_keep, KEEP_THREADS, 1)(const unsigned *words, int rows, int count, unsigned char *keep) {
    const int tiles = (count + TILE - 1) / TILE;
    for (int row = BLOCK; row < rows; row += BLOCKS)
        keep_row(words + (long long)row * tiles * count, count, keep + (long long)row * count);
}
HOST_LAUNCH(nms_keep)
