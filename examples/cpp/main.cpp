// Runs the plans of `comask build` on images and prints COCO results; README.md says how.
#include <filesystem>
#include <fstream>

#include "network.hpp"

static const std::string FLAVOR = COMASK_FLAVOR; // tensorrt or tensorrt-rtx

static std::string read(const std::filesystem::path &file) {
    std::string content(std::filesystem::file_size(file), '\0');
    if (!std::ifstream(file, std::ios::binary).read(content.data(), std::ssize(content)))
        fail(file.string() + ": cannot be read");
    return content;
}

static json read_json(const std::filesystem::path &file, int schema) {
    const json values = json::parse(read(file));
    if (const json &found = values.at("schema_version"); found != schema)
        fail(file.string() + ": has schema " + found.dump() + ", this program reads schema " +
             std::to_string(schema) + "; take the example of the comask that wrote the file");
    return values;
}

// Returns why the plans cannot run here, or nothing. TensorRT does not say what they are for.
static std::string mismatch(const json &engine, const json &manifest) {
    const std::string flavor = engine.at("flavor"), version = engine.at("version");
    if (flavor != FLAVOR) return "are for " + flavor + ", this program was compiled for " + FLAVOR;
    if (engine.at("plugin") == "python") return "run their operators in Python";
    std::string loaded; // four numbers, of which some wheels give the first three
    for (int number : {getInferLibMajorVersion(), getInferLibMinorVersion(),
                       getInferLibPatchVersion(), getInferLibBuildVersion()})
        loaded += (loaded.empty() ? "" : ".") + std::to_string(number);
    const bool later_too = engine.at("options").value("version_compatible", false);
    if (!later_too && !(loaded + ".").starts_with(version + "."))
        return "are for " + flavor + " " + version + ", version " + loaded + " is loaded";
    const json &files = manifest.at("files"); // SHA-256 by name
    for (const json &graph : engine.at("graphs"))
        if (std::find(files.begin(), files.end(), graph) == files.end())
            return "were built from other graphs than those of the bundle";
    return "";
}

static void add_results(json &results, int image_id, Network &network, const Prepared &image,
                        const json &manifest) {
    const int count = network.output<std::int32_t>("num_detections").at(0);
    if (count < 0) fail("the scores are not finite; build plans of a higher precision");
    const auto boxes = network.output<float>("boxes"), scores = network.output<float>("scores"),
               masks = network.output<float>("masks");
    const auto labels = network.output<std::int32_t>("labels");
    const bool framed = manifest.at("model").value("second_boxes", false);
    const auto frames = framed ? network.output<float>("mask_boxes") : boxes; // of the masks
    const std::size_t pixels = masks.size() / scores.size();
    const float x = float(double(image.size.width) / image.original.width);
    const float y = float(double(image.size.height) / image.original.height);
    const auto in_image = [=](auto p) { return cv::Vec4f(p[0] / x, p[1] / y, p[2] / x, p[3] / y); };
    for (int i = 0; i < count; ++i) {
        const cv::Vec4f box = in_image(&boxes[4 * i]), frame = in_image(&frames[4 * i]);
        const auto runs = runs_of_mask(&masks[i * pixels], int(std::lround(std::sqrt(pixels))),
                                       frame, image.original, manifest.at("mask_threshold"));
        results.push_back(
            {{"image_id", image_id}, {"score", scores[i]},
             {"category_id", manifest.at("categories").at(labels[i]).at("id")},
             {"bbox", {box[0], box[1], double(box[2]) - box[0], double(box[3]) - box[1]}},
             {"segmentation", {{"size", {image.original.height, image.original.width}},
                               {"counts", compressed(runs)}}}});
    }
}

int main(int argc, char **argv) try {
    if (argc < 3) fail("usage: comask_trt BUNDLE/engines/FOLDER IMAGE...");
    const std::filesystem::path folder = std::filesystem::canonical(argv[1]);
    const std::filesystem::path bundle = folder.parent_path().parent_path();
    const json engine = read_json(folder / "engine.json", 1);
    const json manifest = read_json(bundle / "manifest.json", 3);
    if (const std::string why = mismatch(engine, manifest); !why.empty())
        fail("the plans in " + folder.string() + " " + why + "; comask build " + bundle.string() +
             " --engine " + FLAVOR + " --precision " + std::string(engine.at("precision")) +
             " --plugin " + (FLAVOR == "tensorrt" ? "aot" : "none") + " --rebuild builds others");
    Network network({read(folder / "stage1.plan"), read(folder / "stage2.plan")},
                    engine.at("options").value("version_compatible", false));
    json results = json::array();
    int status = 0;
    for (int i = 1; i < argc - 1; ++i) try {
            const Prepared image = prepare(argv[i + 1], manifest.at("preprocess"));
            network.run(image, engine.at("profile").at("proposals").at(2));
            add_results(results, i, network, image, manifest);
        } catch (const std::exception &error) {
            std::cerr << argv[i + 1] << ": " << error.what() << '\n';
            status = 1;
        }
    std::cout << results << '\n';
    return status;
} catch (const std::exception &error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
}
