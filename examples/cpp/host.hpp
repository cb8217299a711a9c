// What runs on the CPU: an image becomes the network's input, and a mask becomes COCO's RLE. Both
// round as comask's Python does, so that both give the same bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

#include <nlohmann/json.hpp>
#include <opencv2/imgcodecs.hpp>
#include <opencv2/imgproc.hpp>

using json = nlohmann::ordered_json; // writes keys in the order in which they were added

[[noreturn]] inline void fail(const std::string &what) { throw std::runtime_error(what); }

struct Prepared {
    cv::Mat canvas;          // RGB bytes: the resized image at the top left, zeros elsewhere
    cv::Size size, original; // of the resized and of the decoded image
};

// Decodes, resizes and pads an image; `config` is the manifest's `preprocess`.
inline Prepared prepare(const std::string &path, const json &config) {
    const cv::Mat image = cv::imread(path, cv::IMREAD_COLOR); // upright by EXIF, without alpha
    if (image.empty()) fail("there is no such file, or OpenCV cannot decode it");
    const double short_side = config.at("short_side"), max_side = config.at("max_side");
    const double scale = std::min(short_side / std::min(image.rows, image.cols),
                                  max_side / std::max(image.rows, image.cols));
    const auto resized = [&](int side) { return std::max(1, int(side * scale + 0.5)); };
    const cv::Size size(resized(image.cols), resized(image.rows));
    const int multiple = config.at("pad_multiple");
    const auto padded = [&](int side) { return (side + multiple - 1) / multiple * multiple; };
    cv::Mat canvas = cv::Mat::zeros(padded(size.height), padded(size.width), CV_8UC3);
    cv::resize(image, canvas(cv::Rect({}, size)), size, 0, 0, cv::INTER_LINEAR);
    cv::cvtColor(canvas, canvas, cv::COLOR_BGR2RGB);
    return {canvas, size, image.size()};
}

// A pixel of an axis of the image, between a mask's cells `low` and `low` + 1.
struct Place {
    int pixel, low; // a border of zeros around the mask is cell 0
    float weight;   // of the cell `low` + 1
};

// Returns the pixels of an axis that lie within half a cell of a box.
inline std::vector<Place> places(float start, float stop, int cells, int length) {
    std::vector<Place> found;
    const double extent = double(stop) - double(start);
    for (int pixel = 0; extent > 0 && pixel < length; ++pixel) {
        const double cell = (pixel + 0.5 - start) * (cells / extent) - 0.5, low = std::floor(cell);
        if (cell >= -1 && cell < cells) found.push_back({pixel, int(low) + 1, float(cell - low)});
    }
    return found;
}

// Pastes a mask, `probs` of cells x cells over a box (x1, y1, x2, y2) that may leave the image.
// Returns the lengths of the runs of 0, 1, 0, ... in a walk over the image column by column.
inline std::vector<std::int64_t> runs_of_mask(const float *probs, int cells, const cv::Vec4f &box,
                                              const cv::Size &image, float threshold) {
    const int side = cells + 2;
    std::vector<float> grid(side * side), line(side);
    for (int row = 0; row < cells; ++row)
        std::copy_n(probs + row * cells, cells, &grid[(row + 1) * side + 1]);
    const std::vector<Place> columns = places(box[0], box[2], cells, image.width);
    const std::vector<Place> rows = places(box[1], box[3], cells, image.height);
    const std::int64_t height = image.height, pixels = height * image.width;
    std::vector<std::int64_t> runs;
    std::int64_t last = 0; // of the edges; an edge is the number of pixels that the walk has passed
    bool inside = false;
    const auto change_at = [&](std::int64_t edge) {
        runs.push_back(edge - std::exchange(last, edge));
        inside = !inside;
    };
    for (const Place &x : columns) {
        for (int row = 0; row < side; ++row) { // along x, then along y: the order affects rounding
            const float *pair = &grid[row * side + x.low];
            line[row] = pair[0] + (pair[1] - pair[0]) * x.weight;
        }
        for (const Place &y : rows) {
            const float value = line[y.low] + (line[y.low + 1] - line[y.low]) * y.weight;
            if ((value >= threshold) != inside) change_at(x.pixel * height + y.pixel);
        }
        // A run continues in the next column only if the box spans the image from top to bottom.
        const bool ends = std::ssize(rows) < height || &x == &columns.back();
        if (inside && ends) change_at(x.pixel * height + rows.back().pixel + 1);
    }
    if (last < pixels) change_at(pixels);
    return runs;
}

// Returns COCO's compressed RLE: from the fourth run on, the difference to the run two before; in
// two's complement, five bits a character, the lowest first.
inline std::string compressed(const std::vector<std::int64_t> &runs) {
    std::string text;
    for (std::size_t i = 0; i < runs.size(); ++i) {
        std::int64_t number = i > 2 ? runs[i] - runs[i - 2] : runs[i];
        for (bool more = true; more;) {
            const int bits = int(number & 31);
            number >>= 5;
            more = number != (bits & 16 ? -1 : 0);
            text += char(48 + bits + (more ? 32 : 0));
        }
    }
    return text;
}
