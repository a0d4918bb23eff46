// What hopper_prepare.cu takes from CUDA and from the GPU, for a CPU: a block's threads are threads,
// and blocks run one after the other. BEFORE: what its source needs; AFTER: what starts it.

#ifdef BEFORE
#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#define __device__ static
#define __global__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct Place {
    int x = 0, y = 0;
};
struct uint2 {
    unsigned x, y;
};
struct uint4 {
    unsigned x, y, z, w;
};
struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};
static thread_local Place threadIdx;
static Place blockIdx;
static uint2 make_uint2(unsigned a, unsigned b) { return {a, b}; }
static uint4 make_uint4(unsigned a, unsigned b, unsigned c, unsigned d) { return {a, b, c, d}; }
static float2 make_float2(float a, float b) { return {a, b}; }
using std::max;
using std::min;

static float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
static unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}
static int __popc(unsigned x) { return __builtin_popcount(x); }
static unsigned __byte_perm(unsigned x, unsigned y, unsigned places) {
    unsigned char bytes[8], made[4];
    memcpy(bytes, &x, 4), memcpy(bytes + 4, &y, 4);
    for (int i = 0; i < 4; ++i) made[i] = bytes[places >> 4 * i & 7];
    unsigned found;
    memcpy(&found, made, 4);
    return found;
}

static pthread_barrier_t of_warp[4], of_block;
static void meet() { pthread_barrier_wait(&of_warp[threadIdx.x / 32]); }
static void __syncthreads() { pthread_barrier_wait(&of_block); }
static float said[4][32];
static float __shfl_xor_sync(unsigned, float x, int mask) {
    float(&warp)[32] = said[threadIdx.x / 32];
    warp[threadIdx.x % 32] = x;
    meet();
    float found = warp[threadIdx.x % 32 ^ mask];
    meet();
    return found;
}

// Two bfloat16, the first in the low half.
static unsigned rounded(float a, float b) {
    auto half = [](float x) {
        unsigned bits = __float_as_uint(x);
        return bits + 0x7fff + (bits >> 16 & 1) >> 16;
    };
    return half(a) | half(b) << 16;
}

// mma.m16n8k16, by what the PTX manual says that each lane holds of its operands.
static unsigned operands[4][32][6];
static void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    int lane = threadIdx.x % 32;
    unsigned(&warp)[32][6] = operands[threadIdx.x / 32];
    memcpy(warp[lane], a, 16), warp[lane][4] = b0, warp[lane][5] = b1;
    meet();
    auto number = [&](int of, int word, int half) {
        return __uint_as_float(half ? warp[of][word] & 0xffff0000u : warp[of][word] << 16);
    };
    for (int i = 0; i < 4; ++i) {
        int row = lane / 4, column = lane % 4 * 2 + i % 2;
        float sum = 0;
        for (int k = 0; k < 16; ++k) {
            int pair = k % 8 / 2, upper = k / 8;
            sum += number(row * 4 + pair, 2 * upper + i / 2, k % 2) *
                   number(column * 4 + pair, 4 + upper, k % 2);
        }
        d[i] = sum;
    }
    meet();
}
#endif

#ifdef AFTER
extern "C" void run(int columns, int rows, const Arguments *arguments) {
    for (pthread_barrier_t &one : of_warp) pthread_barrier_init(&one, 0, 32);
    pthread_barrier_init(&of_block, 0, 32 * WARPS);
    for (int block = 0; block < columns * rows; ++block) {
        blockIdx = {block % columns, block / columns};
        std::vector<std::thread> threads;
        for (int i = 0; i < 32 * WARPS; ++i) {
            threads.emplace_back([=] {
                threadIdx = {i, 0};
                prepare(*arguments);
            });
        }
        for (std::thread &thread : threads) thread.join();
    }
}
#endif
