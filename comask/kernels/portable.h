// Definitions that make one kernel source valid as CUDA C (nvcc, NVRTC) and as plain C++ (g++).
//
// Kernels walk over their work in steps of BLOCKS and LANES. On the host, a block therefore runs with one
// thread (LANE 0 of 1), shared memory is a local array, and barriers do nothing. The host's launch
// resembles cuLaunchKernel: it takes an array of pointers to the arguments.
//
// The CPU and GPUs compute the same bits, since all of them round each operation as IEEE 754 has it and
// compile.py's options allow no contraction (tests/test_kernel_ptx.py). There are two exceptions: the bits
// of a NaN, and `multiply_add` on a CPU without FMA, which rounds the product as well. With 2 x 2 samples
// per bin, that changes a result of RoIAlign, before it is rounded to f16, by less than 2^-19 of the map's
// largest value.
//
// With -DLANES_ARE_THREADS, the host's blocks run one after the other, each with as many threads as on a
// GPU. ThreadSanitizer finds races in that build: tests/test_kernel_races.py.
#pragma once

#ifdef __CUDACC__

// `blocks` blocks of `threads` threads must fit a multiprocessor at once, which limits the registers.
#define KERNEL(entry, threads, blocks) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) entry
#define HOST_LAUNCH(entry)
#define DEVICE static __device__ __forceinline__
#define SHARED __shared__
#define RESTRICT __restrict__
#define BLOCK ((int)blockIdx.x)
#define BLOCKS ((int)gridDim.x)
#define LANE ((int)threadIdx.x)
#define LANES ((int)blockDim.x)
#define BARRIER() __syncthreads()

DEVICE float float_of_bits(int bits) { return __int_as_float(bits); }
DEVICE double double_of_bits(int low, int high) { return __hiloint2double(high, low); }
DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// Halves are passed as their bits, so that NVRTC need not find cuda_fp16.h.
DEVICE float to_float(unsigned short half) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
}
DEVICE void store(unsigned short *half, float value) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(*half) : "f"(value));
}

#else

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#define KERNEL(entry, threads, blocks) extern "C" void entry
#define HOST_LAUNCH(entry)                                                            \
    extern "C" void entry##_host(int blocks, int threads, void **arguments) {         \
        spread(entry, blocks, threads, arguments);                                    \
    }
#define DEVICE static inline __attribute__((always_inline))
#define RESTRICT __restrict__
#define BLOCK current_block
#define BLOCKS current_blocks
static thread_local int current_block, current_blocks;

#ifdef LANES_ARE_THREADS
#include <barrier>
#define SHARED static
#define LANE current_lane
#define LANES current_lanes
#define BARRIER() current_barrier->arrive_and_wait()
static thread_local int current_lane, current_lanes;
static thread_local std::barrier<> *current_barrier;
#else
#define SHARED
#define LANE 0
#define LANES 1
#define BARRIER()
#endif

DEVICE float float_of_bits(int bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
DEVICE double double_of_bits(int low, int high) {
    const unsigned long long bits = (unsigned long long)(unsigned)high << 32 | (unsigned)low;
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
DEVICE unsigned bits_of_float(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
DEVICE float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return std::fmaf(a, b, c);
#else
    return a * b + c;  // without the instruction, fmaf would call the library
#endif
}

// Computed on the bits, since g++ does not know _Float16 before version 12.
DEVICE float to_float(unsigned short half) {
    const float two_to_112 = float_of_bits((127 + 112) << 23);  // the difference of the exponents' biases
    float magnitude = float_of_bits((half & 0x7fff) << 13) * two_to_112;
    unsigned bits = bits_of_float(magnitude);
    if (magnitude >= 65536.0f) bits |= 0xffu << 23;  // infinity and NaN
    return float_of_bits((int)(bits | (unsigned)(half & 0x8000) << 16));
}
DEVICE void store(unsigned short *half, float value) {
    const unsigned sign = bits_of_float(value) & 0x80000000u;
    unsigned bits = bits_of_float(value) ^ sign, result;
    if (bits > 0x7f800000u) {
        result = 0x7e00;  // NaN
    } else if (bits >= 0x47800000u) {
        result = 0x7c00;  // 65536 and more
    } else if (bits < 0x38800000u) {
        // Below the least normal half: adding 0.5 leaves the rounded subnormal number in the last bits.
        result = bits_of_float(float_of_bits((int)bits) + 0.5f) - bits_of_float(0.5f);
    } else {
        bits += 0xfffu + (bits >> 13 & 1);  // rounds to nearest, ties to even; may carry to infinity
        result = (bits - (112u << 23)) >> 13;
    }
    *half = (unsigned short)(result | sign >> 16);
}

template <typename... A, std::size_t... I>
static void call(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<A> *>(arguments[I])...);
}

#ifdef LANES_ARE_THREADS
// Runs one block after the other; each of the `threads` threads is a lane of all of them.
template <typename... A>
static void spread(void (*kernel)(A...), int blocks, int threads, void **arguments) {
    std::barrier<> barrier(threads);
    auto work = [&](int lane) {
        current_blocks = blocks, current_lanes = threads, current_lane = lane;
        current_barrier = &barrier;
        for (current_block = 0; current_block < blocks; ++current_block) {
            call(kernel, arguments, std::index_sequence_for<A...>{});
            BARRIER();  // the next block's shared memory is in the same place
        }
    };
    std::vector<std::thread> lanes;
    for (int lane = 0; lane < threads; ++lane) lanes.emplace_back(work, lane);
    for (auto &lane : lanes) lane.join();
}
#else
// Runs the blocks of a launch on up to `threads` threads. Each begins with a block of its own, then takes
// the next one in turn; nothing orders the blocks, as on a GPU.
template <typename... A>
static void spread(void (*kernel)(A...), int blocks, int threads, void **arguments) {
    const int workers = std::max(1, std::min(threads, blocks));
    std::atomic<int> next{workers};
    auto work = [&](int block) {
        current_blocks = blocks;
        for (; block < blocks; block = next.fetch_add(1, std::memory_order_relaxed)) {
            current_block = block;
            call(kernel, arguments, std::index_sequence_for<A...>{});
        }
    };
    std::vector<std::thread> others;
    for (int i = 1; i < workers; ++i) others.emplace_back(work, i);
    work(0);
    for (auto &other : others) other.join();
}
#endif

#endif

DEVICE float to_float(float value) { return value; }
DEVICE void store(float *place, float value) { *place = value; }

template <typename T> DEVICE T smaller(T a, T b) { return a < b ? a : b; }
template <typename T> DEVICE T larger(T a, T b) { return a > b ? a : b; }
