// A bundle's two plans on the GPU; stage 2 reads stage 1's outputs where stage 1 wrote them.
#pragma once

#include <iostream>
#include <map>
#include <memory>

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include "host.hpp"

namespace trt = nvinfer1;

inline void check(cudaError_t status, const std::string &what) {
    if (status != cudaSuccess) fail(what + ": " + cudaGetErrorString(status));
}

// Memory that grows and never shrinks, so that another image of the same size allocates nothing.
struct DeviceMemory {
    std::unique_ptr<void, cudaError_t (*)(void *)> address{nullptr, cudaFree};
    std::size_t size = 0;

    void *get() const { return address.get(); }
    void grow(std::size_t wanted) {
        if (wanted <= size) return;
        address.reset(), size = 0; // first, so that both never occupy memory at once
        void *memory = nullptr;
        check(cudaMalloc(&memory, wanted), std::to_string(wanted) + " bytes of GPU memory");
        address.reset(memory), size = wanted;
    }
};

struct Tensor {
    trt::Dims dims{}; trt::DataType type{};
    int vector = 1; // the format HWC8 of feature maps pads their channels to a multiple of this
    DeviceMemory memory;

    std::size_t bytes() const { // the graphs have no other types than u8, f16, i32 and f32
        std::size_t size = type == trt::DataType::kUINT8 ? 1 : type == trt::DataType::kHALF ? 2 : 4;
        for (int i = 0; i < dims.nbDims; ++i)
            size *= i == 1 ? (dims.d[i] + vector - 1) / vector * vector : dims.d[i];
        return size;
    }
};

class Network {
    struct Log : trt::ILogger { // TensorRT's functions only return false or null
        void log(Severity severity, const char *text) noexcept override {
            if (severity <= Severity::kWARNING) std::cerr << "TensorRT: " << text << '\n';
        }
    };
    struct Stage {
        std::unique_ptr<trt::ICudaEngine> engine;
        std::unique_ptr<trt::IExecutionContext> context; // destroyed before its engine
        std::vector<const char *> inputs, outputs;
    };

    Log log_; // outlives the runtime, as the runtime outlives the engines
    std::unique_ptr<trt::IRuntime> runtime_;
    std::unique_ptr<CUstream_st, cudaError_t (*)(cudaStream_t)> stream_{nullptr, cudaStreamDestroy};
    std::map<std::string, Tensor> tensors_; // of both stages
    DeviceMemory scratch_;                  // for both stages, which run one after the other
    Stage stages_[2];

    static void must(bool succeeded, const std::string &what) {
        if (!succeeded) fail("TensorRT refuses " + what + "; the lines above say why");
    }
    void copy(void *to, const void *from, std::size_t size, cudaMemcpyKind kind) {
        check(cudaMemcpyAsync(to, from, size, kind, stream_.get()), "copying a tensor");
    }
    void upload(const char *name, trt::DataType type, trt::Dims dims, const void *values) {
        Tensor &tensor = tensors_[name];
        tensor.dims = dims, tensor.type = type, tensor.memory.grow(tensor.bytes());
        copy(tensor.memory.get(), values, tensor.bytes(), cudaMemcpyHostToDevice);
    }
    // Tells a stage its inputs' shapes, and makes room for its outputs and its scratch memory.
    void prepare(Stage &stage) {
        for (const char *name : stage.inputs)
            must(stage.context->setInputShape(name, tensors_[name].dims),
                 name + std::string(" of this shape (comask build --profile sets the range)"));
        must(stage.context->inferShapes(0, nullptr) == 0, "these shapes together");
        for (const char *name : stage.outputs) {
            Tensor &tensor = tensors_[name];
            tensor.dims = stage.context->getTensorShape(name);
            tensor.type = stage.engine->getTensorDataType(name);
            tensor.vector = std::max(1, stage.engine->getTensorComponentsPerElement(name));
            tensor.memory.grow(tensor.bytes());
        }
        std::size_t scratch = stage.context->updateDeviceMemorySizeForShapes();
        // 0 also stands for an error, after which the largest shapes' size is enough.
        if (!scratch) scratch = stage.engine->getDeviceMemorySizeForProfileV2(0);
        scratch_.grow(std::max<std::size_t>(1, scratch));
    }

public:
    // Plans that run with later versions of TensorRT contain code for the CPU, to be allowed here.
    Network(const std::string (&plans)[2], bool allow_host_code) {
        cudaStream_t stream = nullptr;
        check(cudaStreamCreate(&stream), "a CUDA stream"), stream_.reset(stream);
        runtime_.reset(trt::createInferRuntime(log_));
        must(runtime_ != nullptr, "to start");
        runtime_->setEngineHostCodeAllowed(allow_host_code);
        for (int i = 0; i < 2; ++i) {
            auto &[engine, context, inputs, outputs] = stages_[i];
            engine.reset(runtime_->deserializeCudaEngine(plans[i].data(), plans[i].size()));
            must(engine != nullptr, "the plan of stage " + std::to_string(i + 1));
            // Otherwise a context allocates scratch memory for the largest shapes of the profile.
            context.reset(engine->createExecutionContext(
                trt::ExecutionContextAllocationStrategy::kUSER_MANAGED));
            must(context != nullptr, "an execution context");
            for (int place = 0; place < engine->getNbIOTensors(); ++place) {
                const char *name = engine->getIOTensorName(place);
                const bool in = engine->getTensorIOMode(name) == trt::TensorIOMode::kINPUT;
                (in ? inputs : outputs).push_back(name);
            }
        }
    }
    // Queues both stages on one image; stage 2 takes at most `proposals` proposals.
    void run(const Prepared &image, std::int64_t proposals) {
        const std::int32_t size[] = {image.size.height, image.size.width};
        const trt::Dims canvas{4, {1, image.canvas.rows, image.canvas.cols, 3}};
        upload("images", trt::DataType::kUINT8, canvas, image.canvas.data);
        upload("image_sizes", trt::DataType::kINT32, {2, {1, 2}}, size);
        prepare(stages_[0]);
        for (const char *name : {"proposals", "proposal_scores"}) // the best proposals come first
            tensors_[name].dims.d[1] = std::min(tensors_[name].dims.d[1], proposals);
        prepare(stages_[1]); // before a stage runs, since it may replace the scratch memory
        for (Stage &stage : stages_) {
            for (const auto *names : {&stage.inputs, &stage.outputs})
                for (const char *name : *names)
                    must(stage.context->setTensorAddress(name, tensors_[name].memory.get()), name);
            stage.context->setDeviceMemoryV2(scratch_.get(), std::int64_t(scratch_.size));
            must(stage.context->enqueueV3(stream_.get()), "to run");
        }
    }
    // Waits for an output of the last run, of type float or int32_t, and returns its values.
    template <typename T> std::vector<T> output(const std::string &name) {
        const Tensor &tensor = tensors_[name];
        std::vector<T> values(tensor.bytes() / sizeof(T));
        copy(values.data(), tensor.memory.get(), tensor.bytes(), cudaMemcpyDeviceToHost);
        check(cudaStreamSynchronize(stream_.get()), "the network");
        for (T value : values)
            if (!std::isfinite(value)) fail(name + " are not finite; use a higher precision");
        return values;
    }
};
