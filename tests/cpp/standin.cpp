// A stand-in for TensorRT and the CUDA runtime. A plan holds recorded calls of a stage; "running" it
// compares the inputs with the recorded ones bit for bit and gives the recorded outputs. It refuses what
// TensorRT would refuse or crash at: shapes outside the profile, addresses that are not the device's or
// have too little room, contexts without scratch memory, objects that die in the wrong order. The host
// cannot touch device memory, and queued work is done when the stream is synchronised.
//
// A plan is a text that ends with the line `data`, then the bytes of all tensors in the text's order:
//     stand-in plan
//     code 0                                whether the plan contains code for the CPU
//     profile images 4 1 32 32 3 8 96 96 3  dimensions, least and largest shape
//     case                                  begins a recorded call
//     in images 5 4 1 64 96 3               type as in NvInfer.h, dimensions, shape
//     out p2 0 4 1 32 16 24
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "NvInfer.h"

namespace {

using namespace nvinfer1;
using Shape = std::vector<std::int64_t>;
using Bytes = std::vector<unsigned char>;

[[noreturn]] void die(const std::string &what) {
    std::fprintf(stderr, "stand-in: %s\n", what.c_str());
    std::_Exit(99);
}

// Device memory: its addresses cannot be read or written, its content is elsewhere.
struct Device {
    std::map<unsigned char *, Bytes> blocks;
    std::vector<std::function<void()>> queue;
    int streams = 0;
    cudaError_t broken = cudaSuccess; // an error in queued work, which is permanent as in CUDA

    ~Device() {
        if (!blocks.empty() || streams) die("memory or streams were not freed");
    }
    // The content at an address, or null if fewer bytes than `size` follow it.
    unsigned char *content(const void *address, std::size_t size) {
        auto *place = static_cast<unsigned char *>(const_cast<void *>(address));
        auto block = blocks.upper_bound(place);
        if (block == blocks.begin()) return nullptr;
        --block;
        const std::size_t offset = place - block->first;
        if (offset + size > block->second.size()) return nullptr;
        return block->second.data() + offset;
    }
    void synchronize() {
        for (const auto &work : std::exchange(queue, {})) work();
    }
} device;

struct Recorded {
    std::string name;
    bool input;
    DataType type;
    Shape shape;
    Bytes bytes;
};
using Case = std::vector<Recorded>;

std::size_t size_of(DataType type) {
    return type == DataType::kUINT8 ? 1 : type == DataType::kHALF ? 2 : 4;
}

Dims dims_of(const Shape &shape) {
    Dims dims{};
    dims.nbDims = std::int32_t(shape.size());
    std::copy(shape.begin(), shape.end(), dims.d);
    return dims;
}

std::string text(const Shape &shape) {
    std::string all;
    for (auto side : shape) all += (all.empty() ? "" : "x") + std::to_string(side);
    return all;
}

Shape read_shape(std::istream &in, int dimensions) {
    Shape shape(dimensions);
    for (auto &side : shape) in >> side;
    return shape;
}

std::size_t scratch_of(const Case &one) {
    std::size_t size = 1000;
    for (const Recorded &tensor : one) size += tensor.bytes.size();
    return size;
}

struct Plan {
    std::map<std::string, std::pair<Shape, Shape>> profile;
    std::vector<Case> cases;
    bool code = false;
};

class Context : public IExecutionContext {
public:
    Context(ILogger &log, const Plan &plan, int &alive) : log_(log), plan_(plan), alive_(alive) {
        ++alive_;
    }
    ~Context() noexcept override { --alive_; }

    bool setInputShape(char const *name, Dims const &dims) noexcept override {
        const Shape shape(dims.d, dims.d + dims.nbDims);
        const auto limits = plan_.profile.find(name);
        if (limits == plan_.profile.end()) return refuse(std::string("no input ") + name);
        const auto &[least, largest] = limits->second;
        bool inside = shape.size() == least.size();
        for (std::size_t i = 0; inside && i < shape.size(); ++i)
            inside = least[i] <= shape[i] && shape[i] <= largest[i];
        if (!inside)
            return refuse(std::string(name) + " is " + text(shape) + ", the profile has " +
                          text(least) + " to " + text(largest));
        inputs_[name] = shape;
        matching_.clear();
        scratch_needed_ = 0;
        return true;
    }
    std::int32_t inferShapes(std::int32_t, char const **) noexcept override {
        matching_.clear();
        for (const Case &one : plan_.cases)
            if (std::all_of(one.begin(), one.end(), [&](const Recorded &tensor) {
                    return !tensor.input ||
                           (inputs_.count(tensor.name) && inputs_[tensor.name] == tensor.shape);
                }))
                matching_.push_back(&one);
        if (!matching_.empty()) return 0;
        refuse("no recorded call has these shapes");
        return -1;
    }
    Dims getTensorShape(char const *name) const noexcept override {
        if (!matching_.empty())
            for (const Recorded &tensor : *matching_[0])
                if (tensor.name == name) return dims_of(tensor.shape);
        Dims unknown{};
        unknown.nbDims = -1;
        return unknown;
    }
    std::size_t updateDeviceMemorySizeForShapes() noexcept override {
        if (matching_.empty()) return 0;
        scratch_needed_ = scratch_of(*matching_[0]);
        return std::getenv("STANDIN_NO_SIZE") ? 0
                                              : scratch_needed_; // an error, which TensorRT has had
    }
    void setDeviceMemoryV2(void *memory, std::int64_t size) noexcept override {
        scratch_ = memory;
        scratch_size_ = std::size_t(size);
    }
    bool setTensorAddress(char const *name, void *data) noexcept override {
        addresses_[name] = data;
        return device.content(data, 1) ||
               refuse(std::string(name) + " has no address on the device");
    }
    bool enqueueV3(cudaStream_t stream) noexcept override {
        if (matching_.empty()) return refuse("shapes are unknown");
        if (!stream) return refuse("the default stream");
        if (!scratch_needed_ || scratch_size_ < scratch_needed_ ||
            !device.content(scratch_, scratch_size_))
            return refuse("there is too little scratch memory");
        for (const Recorded &tensor : *matching_[0])
            if (!device.content(addresses_[tensor.name], tensor.bytes.size()))
                return refuse(tensor.name + " has too little room");
        const auto run = [this, matching = matching_, addresses = addresses_, scratch = scratch_,
                          size = scratch_size_]() mutable {
            std::memset(device.content(scratch, size), 0xA5, size); // it may not overlap a tensor
            std::string differences;
            for (const Case *one : matching) {
                const std::string difference = first_difference(*one, addresses);
                if (difference.empty()) {
                    for (const Recorded &tensor : *one)
                        if (!tensor.input)
                            std::copy(tensor.bytes.begin(), tensor.bytes.end(),
                                      device.content(addresses[tensor.name], tensor.bytes.size()));
                    return;
                }
                differences += (differences.empty() ? "" : "; ") + difference;
            }
            refuse("the inputs are not the recorded ones: " + differences);
            device.broken = cudaErrorLaunchFailure;
        };
        device.queue.push_back(run);
        return true;
    }

private:
    static std::string first_difference(const Case &one, std::map<std::string, void *> &addresses) {
        for (const Recorded &tensor : one) {
            const unsigned char *found =
                device.content(addresses[tensor.name], tensor.bytes.size());
            std::size_t count = 0;
            for (std::size_t i = 0; tensor.input && i < tensor.bytes.size(); ++i)
                count += found[i] != tensor.bytes[i];
            if (count)
                return std::to_string(count) + " of " + std::to_string(tensor.bytes.size()) +
                       " bytes of " + tensor.name;
        }
        return "";
    }
    bool refuse(const std::string &why) noexcept {
        log_.log(ILogger::Severity::kERROR, why.c_str());
        return false;
    }
    ILogger &log_;
    const Plan &plan_;
    int &alive_;
    std::map<std::string, Shape> inputs_;
    std::map<std::string, void *> addresses_;
    std::vector<const Case *> matching_;
    void *scratch_ = nullptr;
    std::size_t scratch_size_ = 0, scratch_needed_ = 0;
};

class Engine : public ICudaEngine {
public:
    Engine(ILogger &log, Plan plan, int &alive) : log_(log), plan_(std::move(plan)), alive_(alive) {
        ++alive_;
    }
    ~Engine() noexcept override {
        if (contexts_) die("an engine died before its context");
        --alive_;
    }
    std::int32_t getNbIOTensors() const noexcept override {
        return std::int32_t(plan_.cases[0].size());
    }
    char const *getIOTensorName(std::int32_t index) const noexcept override {
        return plan_.cases[0].at(index).name.c_str();
    }
    TensorIOMode getTensorIOMode(char const *name) const noexcept override {
        return tensor(name).input ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
    }
    // -1 for a format without vectors, as LINEAR and HWC are.
    int32_t getTensorComponentsPerElement(char const *) const noexcept override { return -1; }
    DataType getTensorDataType(char const *name) const noexcept override {
        return tensor(name).type;
    }
    std::int64_t getDeviceMemorySizeForProfileV2(std::int32_t) const noexcept override {
        std::size_t largest = 0;
        for (const Case &one : plan_.cases) largest = std::max(largest, scratch_of(one));
        return std::int64_t(largest);
    }
    IExecutionContext *
    createExecutionContext(ExecutionContextAllocationStrategy strategy) noexcept override {
        if (strategy != ExecutionContextAllocationStrategy::kUSER_MANAGED)
            die("memory for the largest shapes");
        return new Context(log_, plan_, contexts_);
    }

private:
    const Recorded &tensor(const std::string &name) const {
        for (const Recorded &one : plan_.cases[0])
            if (one.name == name) return one;
        die("no tensor " + name);
    }
    ILogger &log_;
    Plan plan_;
    int &alive_, contexts_ = 0;
};

class Runtime : public IRuntime {
public:
    explicit Runtime(ILogger &log) : log_(log) {}
    ~Runtime() noexcept override {
        if (engines_) die("the runtime died before its engines");
    }
    void setEngineHostCodeAllowed(bool allowed) noexcept override { allowed_ = allowed; }
    ICudaEngine *deserializeCudaEngine(void const *blob, std::size_t size) noexcept override {
        const std::string content(static_cast<const char *>(blob), size);
        std::size_t data = content.find("\ndata\n");
        if (content.rfind("stand-in plan\n", 0) != 0 || data == std::string::npos)
            return refuse("not a plan");
        std::istringstream lines(content.substr(0, data));
        data += 6;
        Plan plan;
        std::string line;
        while (std::getline(lines, line)) {
            std::istringstream words(line);
            std::string kind, name;
            int type = 0, dimensions = 0;
            words >> kind;
            if (kind == "code") words >> plan.code;
            if (kind == "case") plan.cases.emplace_back();
            if (kind == "profile") {
                words >> name >> dimensions;
                const Shape least = read_shape(words, dimensions);
                plan.profile[name] = {least, read_shape(words, dimensions)};
            }
            if (kind != "in" && kind != "out") continue;
            words >> name >> type >> dimensions;
            Recorded tensor{name, kind == "in", DataType(type), read_shape(words, dimensions), {}};
            std::size_t bytes = size_of(tensor.type);
            for (auto side : tensor.shape) bytes *= side;
            tensor.bytes.assign(content.begin() + data, content.begin() + data + bytes);
            data += bytes;
            plan.cases.back().push_back(std::move(tensor));
        }
        if (data != content.size()) return refuse("the plan has another size than it says");
        if (plan.code && !allowed_)
            return refuse("the plan contains code for the CPU, which is not allowed");
        return new Engine(log_, std::move(plan), engines_);
    }

private:
    ICudaEngine *refuse(const char *why) {
        log_.log(ILogger::Severity::kERROR, why);
        return nullptr;
    }
    ILogger &log_;
    int engines_ = 0;
    bool allowed_ = false;
};

} // namespace

namespace nvinfer1 {
IRuntime *createInferRuntime(ILogger &logger) noexcept { return new Runtime(logger); }
} // namespace nvinfer1

extern "C" {

std::int32_t getInferLibMajorVersion() noexcept { return 10; }
std::int32_t getInferLibMinorVersion() noexcept { return 99; }
std::int32_t getInferLibPatchVersion() noexcept { return 1; }
std::int32_t getInferLibBuildVersion() noexcept { return 23; }

cudaError_t cudaMalloc(void **memory, std::size_t size) {
    if (!size || device.blocks.size() > 1000) return cudaErrorMemoryAllocation;
    void *place =
        mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (place == MAP_FAILED) return cudaErrorMemoryAllocation;
    *memory = place;
    device.blocks[static_cast<unsigned char *>(place)] = Bytes(size, 0x5A);
    return cudaSuccess;
}

cudaError_t cudaFree(void *memory) {
    device.synchronize(); // as CUDA does
    const auto block = device.blocks.find(static_cast<unsigned char *>(memory));
    if (block == device.blocks.end()) return memory ? cudaErrorInvalidValue : cudaSuccess;
    munmap(memory, block->second.size());
    device.blocks.erase(block);
    return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    if (std::getenv("STANDIN_NO_GPU")) return cudaErrorNoDevice;
    ++device.streams;
    *stream = reinterpret_cast<cudaStream_t>(&device);
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t) {
    --device.streams;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) {
    device.synchronize();
    return device.broken;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, std::size_t size, cudaMemcpyKind kind,
                            cudaStream_t stream) {
    if (!stream || device.broken != cudaSuccess)
        return stream ? device.broken : cudaErrorInvalidValue;
    const void *there = kind == cudaMemcpyHostToDevice ? to : from;
    if (!device.content(there, size)) return cudaErrorInvalidValue;
    if (kind == cudaMemcpyHostToDevice) {
        // CUDA has read pageable memory when the call returns
        const auto *bytes = static_cast<const unsigned char *>(from);
        device.queue.push_back([to, values = Bytes(bytes, bytes + size)] {
            std::copy(values.begin(), values.end(), device.content(to, values.size()));
        });
    } else {
        device.queue.push_back(
            [to, from, size] { std::memcpy(to, device.content(from, size), size); });
    }
    return cudaSuccess;
}

const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    default: return "invalid argument";
    }
}

} // extern "C"
