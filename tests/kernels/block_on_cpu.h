// What hopper_attention.cu takes from CUDA and from the GPU, for a CPU: a block's threads are threads
// of the CPU, one block runs after the other, copies and products are done where they are issued.
// Included three times: before the source, in place of its PTX section, and after it.
//
// Not shown by this: what is asynchronous on a GPU, and its speed.

#ifdef BEFORE
#include <pthread.h>

#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __global__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct int4 { int x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct Place { int x, y, z; };
static thread_local Place threadIdx, blockIdx;
static Place blockDim;
static char *memory;  // a block's shared memory

template <class To, class From> static To bits(From from) {
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
static int __float_as_int(float x) { return bits<int>(x); }
static float __int_as_float(int x) { return bits<float>(x); }
using std::max;
using std::min;

// Warps and the block meet at barriers; lanes exchange through a place in memory.
static pthread_barrier_t of_warp[16], of_group[4], of_block;
static int told[16][32];
static int warp() { return threadIdx.x / 32; }
static int lane_of() { return threadIdx.x % 32; }
static void meet() { pthread_barrier_wait(&of_warp[warp()]); }
static void __syncwarp() { meet(); }
static void __syncthreads() { pthread_barrier_wait(&of_block); }
template <class T> static T told_by(T x, int lane) {
    told[warp()][lane_of()] = bits<int>(x);
    meet();
    T found = bits<T>(told[warp()][lane]);
    meet();
    return found;
}
static float __shfl_xor_sync(unsigned, float x, int mask) { return told_by(x, lane_of() ^ mask); }
static int __shfl_sync(unsigned, int x, int lane) { return told_by(x, lane); }
static bool __any_sync(unsigned, bool x) {
    told[warp()][lane_of()] = x;
    meet();
    bool any = false;
    for (int lane = 0; lane < 32; ++lane) any |= told[warp()][lane];
    meet();
    return any;
}
#endif

#ifdef INSTEAD_OF_PTX
// ---- Barriers in shared memory, and copies ------------------------------------------------------

struct Barrier {
    unsigned short count, missing;
    int rest;  // bytes that are still to come, times two, plus the phase
};
static std::mutex lock;
static std::condition_variable changed;
static Barrier &barrier(u64 &x) { return *reinterpret_cast<Barrier *>(&x); }
static void advance(u64 &x, int arrivals, int bytes) {
    std::unique_lock<std::mutex> held(lock);
    Barrier &b = barrier(x);
    b.missing -= arrivals;
    b.rest += 2 * bytes;
    if (b.missing == 0 && b.rest / 2 == 0) {
        b.missing = b.count;
        b.rest ^= 1;
        changed.notify_all();
    }
}
static void start_barrier(u64 &x, int count) {
    barrier(x) = {(unsigned short)count, (unsigned short)count, 0};
}
static void expect(u64 &x, int bytes) { advance(x, 1, bytes); }
static void arrive(u64 &x) { advance(x, 1, 0); }
static void arrive_if(bool so, u64 &x) {
    if (so) arrive(x);
}
static void wait(u64 &x, int parity) {
    std::unique_lock<std::mutex> held(lock);
    changed.wait(held, [&] { return (barrier(x).rest & 1) != parity; });
}
static bool over(u64 &x, int parity) {
    std::unique_lock<std::mutex> held(lock);
    return (barrier(x).rest & 1) != parity;
}

// A tensor map: sizes and strides in bytes, the innermost first; boxes have rows of 128 bytes.
struct Map {
    const char *base;
    i64 size[4], stride[4];
    int rows;
};
static char *swizzled(char *place) {
    uintptr_t x = (uintptr_t)place;
    return (char *)(x ^ (x >> 7 & 7) << 4);
}
static void copy_bytes(void *to, const TensorMap &map, int x, int y, int z, int w, u64 &full) {
    const Map &from = *reinterpret_cast<const Map *>(&map);
    for (int row = 0; row < from.rows; ++row) {
        for (int i = 0; i < 128; ++i) {
            bool inside = x + i < from.size[0] && y + row < from.size[1];
            i64 place = w * from.stride[3] + z * from.stride[2] + (y + row) * from.stride[1] + x + i;
            *swizzled((char *)to + row * 128 + i) = inside ? from.base[place] : 0;
        }
    }
    advance(full, 0, -from.rows * 128);
}
static void copy_to_pair(void *, const TensorMap &, int, int, u64 &) { abort(); }
static int rank_in_pair() { abort(); }
static void arrive_at(u64 &, int) { abort(); }
static void meet_pair() { abort(); }
static void copy_tile(void *to, const TensorMap &map, int x, int y, u64 &full) {
    copy_bytes(to, map, x, y, 0, 0, full);
}
static void copy_tile(void *to, const TensorMap &map, int x, int y, int z, int w, u64 &full) {
    copy_bytes(to, map, 2 * x, y, z, w, full);  // of 16-bit elements
}

// ---- Formats ------------------------------------------------------------------------------------

static float of_half(unsigned short x) {
    int exponent = x >> 10 & 31, fraction = x & 1023;
    float value = exponent ? ldexpf(1024 + fraction, exponent - 25) : ldexpf(fraction, -24);
    return x >> 15 ? -value : value;
}
static u32 half(float x) {  // of no number that it can't hold
    int exponent = max(x == 0 ? -14 : ilogbf(x), -14);
    u32 size = (exponent + 14 << 10) + (u32)nearbyintf(ldexpf(fabsf(x), 10 - exponent));
    return (x < 0 ? 0x8000 : 0) | size;
}
static float of_bfloat(unsigned short x) { return bits<float>((unsigned)x << 16); }
static float of_e4m3(unsigned char x) {
    int exponent = x >> 3 & 15, fraction = x & 7;
    float value = exponent ? ldexpf(8 + fraction, exponent - 10) : ldexpf(fraction, -9);
    return x >> 7 ? -value : value;
}
static u32 e4m3(float x) {
    u32 low = 0, sign = x < 0 ? 128 : 0;
    float size = fabsf(x);
    while (low < 126 && of_e4m3(low + 1) <= size) ++low;
    if (low == 126) return sign | low;
    float below = size - of_e4m3(low), above = of_e4m3(low + 1) - size;
    return sign | (low + (above < below || (above == below && low % 2)));
}
static unsigned short two_e4m3(float a, float b) { return e4m3(a) | e4m3(b) << 8; }
static u32 four_e4m3(float a, float b, float c, float d) {
    return e4m3(a) | e4m3(b) << 8 | e4m3(c) << 16 | e4m3(d) << 24;
}
static u32 sixteen(float x, bool as_half) {
    if (as_half) return half(x);
    u32 exact = bits<u32>(x);
    return (exact + 0x7fff + (exact >> 16 & 1)) >> 16;
}
static u32 two_of(float a, float b, bool as_half) {
    return sixteen(a, as_half) | sixteen(b, as_half) << 16;
}

// ---- Products, by what each thread holds of their operands --------------------------------------

static u64 descriptor(const void *tile, int = 16) { return (u64)tile >> 4; }
static char at(u64 descriptor, int byte) { return *swizzled((char *)(descriptor << 4) + byte); }
static unsigned short two_bytes_at(u64 descriptor, int byte) {
    return *(unsigned short *)swizzled((char *)(descriptor << 4) + byte);
}
static u64 kept(u64 descriptor) { return descriptor; }
static void fence() {}
static void commit() {}
template <int PENDING> static void wait_products() {}
template <class T, int N> static void pin(T (&)[N]) {}
static int column(int i) { return i / 4 * 8 + lane_of() % 4 * 2 + i % 2; }

static void multiply_scores(int (&s)[64], u64 q, u64 k) {
    for (int i = 0; i < 64; ++i) {
        int row = threadIdx.x % 128 / 32 * 16 + lane_of() / 4 + i / 2 % 2 * 8;
        for (int j = 0; j < 32; ++j) {
            s[i] += (signed char)at(q, row * 128 + j) * (signed char)at(k, column(i) * 128 + j);
        }
    }
    meet();
}

// The thread's two rows of an operand that the lanes hold, each row with SIZE values of its words.
static u32 held[16][32][4];
static void share(const u32 *p) {
    meet();
    for (int i = 0; i < 4; ++i) held[warp()][lane_of()][i] = p[i];
    meet();
}
static u32 value_of(int row, int j, int each) {  // `each` values to a word
    int lane = lane_of() / 4 * 4 + j % (4 * each) / each;
    return held[warp()][lane][j / (4 * each) * 2 + row] >> j % each * (32 / each);
}
static void multiply_values(float (&t)[64], const u32 *p, u64 v) {
    auto value = [](u32 x) { return V_FORMAT == 1 ? of_bfloat(x) : of_half(x); };
    share(p);
    for (int i = 0; i < 64; ++i) {
        int place = column(i) / 64 * (V_BYTES / 2) + column(i) % 64 * 2;
        float sum = 0;
        for (int j = 0; j < 16; ++j) {
            sum += value(value_of(i / 2 % 2, j, 2)) * value(two_bytes_at(v, place + j * 128));
        }
        t[i] += sum;
    }
    meet();
}
static void multiply_values(float (&t)[68], const u32 *p, u64 v, int add) {
    share(p);
    for (int i = 0; i < 68; ++i) {
        float sum = 0;
        for (int j = 0; j < 32; ++j) {
            sum += of_e4m3(value_of(i / 2 % 2, j, 4)) * of_e4m3(at(v, column(i) * 128 + j));
        }
        t[i] = (add ? t[i] : 0) + sum;
    }
    meet();
}

static float exp2_of(float x) { return exp2f(x); }
static float reciprocal(float x) { return 1 / x; }
static float log2_of(float x) { return log2f(x); }
static float sum_across_row(float x) {
    for (int mask = 1; mask < 4; mask *= 2) x += __shfl_xor_sync(~0u, x, mask);
    return x;
}
static bool any_of_warpgroup(bool x, int group) {
    static int said[4][128];
    said[group][threadIdx.x % 128] = x;
    pthread_barrier_wait(&of_group[group]);
    bool any = false;
    for (int i = 0; i < 128; ++i) any |= said[group][i];
    pthread_barrier_wait(&of_group[group]);
    return any;
}
template <int COUNT> static void give_registers() {}
template <int COUNT> static void take_registers() {}
static void show_writes() {}
#endif

#ifdef AFTER
extern "C" void run(int across, int down, const Map *maps, const Arguments *a) {
    int count = (WARPGROUPS + 1) * 128;
    blockDim.x = count;
    memory = (char *)aligned_alloc(1024, SHARED_BYTES);
    TensorMap tensor_maps[3] = {};
    for (int i = 0; i < 3; ++i) memcpy(&tensor_maps[i], maps + i, sizeof(Map));
    for (int warp = 0; warp < count / 32; ++warp) pthread_barrier_init(&of_warp[warp], 0, 32);
    for (pthread_barrier_t &one : of_group) pthread_barrier_init(&one, 0, 128);
    pthread_barrier_init(&of_block, 0, count);
    for (int block = 0; block < across * down; ++block) {
        memset(memory, 0x7f, SHARED_BYTES);  // NaN, where something is read too early
        std::vector<std::thread> threads;
        for (int i = 0; i < count; ++i) {
            threads.emplace_back([=, &tensor_maps] {
                threadIdx = {i, 0, 0};
                blockIdx = {block % across, block / across, 0};
                attention(tensor_maps[0], tensor_maps[1], tensor_maps[2], *a);
            });
        }
        for (std::thread &thread : threads) thread.join();
    }
    free(memory);
}
#endif
