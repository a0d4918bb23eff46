// A product of FP8 rows, its bias and GELU, written as FP8 rows, on Hopper (compute capability 9.0).
//
// out[m][n] · out_scale[m] = gelu(x[m]·w[n] · x_scale[m] · w_scale[n] + bias[n])
//
// Blocks stay: each computes one tile of 128 rows by 256 columns after the other. One warp copies;
// two warpgroups multiply, 64 rows each, and write while the next tile's operands are on their way.
//
// What a thread holds: of its warpgroup's 64 rows the two rows 16·warp + lane/4 and 8 below, of each
// 8 columns the two that begin at 2·(lane % 4).

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int M_TILE = 128, N_TILE = 256, K_TILE = 128;
constexpr int A_BYTES = M_TILE * K_TILE, B_BYTES = N_TILE * K_TILE;

struct __align__(1024) Shared {
    char a[STAGES][A_BYTES];
    char b[STAGES][B_BYTES];
    char out[2][2][64 * 128];  // of a warpgroup's rows, the tile's left and right columns
    u64 full[STAGES], free[STAGES];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "the launcher asks for what this takes");

struct __align__(64) TensorMap {
    char bytes[128];
};

struct Arguments {
    const float *x_scale, *x_norm;  // [M]; the length of each row
    const float *w_scale;           // [N]
    const unsigned short *bias;     // [N] bfloat16
    const float *bound;             // [2]: out_scale is the row's length times the first, plus the second
    float *out_scale;               // [M]
    int m, n, steps;                // rows, columns, tiles along K
    int m_tiles, n_tiles;
};

// ---- PTX ---------------------------------------------------------------------------------------

__device__ __forceinline__ u32 address(const void *pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void start_barrier(u64 &barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(&barrier)), "r"(arrivals));
}

__device__ __forceinline__ void expect(u64 &barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(&barrier)),
                 "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void arrive(u64 &barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(&barrier)) : "memory");
}

__device__ __forceinline__ void wait(u64 &barrier, int parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(address(&barrier)),
        "r"(parity)
        : "memory");
}

__device__ __forceinline__ void copy_tile(void *to, const TensorMap &map, int x, int y, u64 &full) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3}], [%4];" ::"r"(address(to)),
        "l"(&map), "r"(x), "r"(y), "r"(address(&full))
        : "memory");
}

__device__ __forceinline__ void write_tile(const TensorMap &map, const void *from, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(
            &map),
        "r"(x), "r"(y), "r"(address(from))
        : "memory");
}

__device__ __forceinline__ void commit_writes() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until what the thread's writes come from may be overwritten.
__device__ __forceinline__ void wait_reads_of_writes() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

__device__ __forceinline__ void wait_writes() {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// What threads have written to shared memory is seen by copies.
__device__ __forceinline__ void show_writes() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A tile in shared memory as wgmma takes it: rows of 128 bytes, swizzled by 128.
__device__ __forceinline__ u64 descriptor(const void *tile) {
    u32 low = address(tile) >> 4 | 1 << 16, high = 1024 >> 4 | 1 << 30;
    u64 made;
    asm("mov.b64 %0, {%1, %2};" : "=l"(made) : "r"(low), "r"(high));
    return made;
}

__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PENDING> __device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void meet_warpgroup(int group) {
    asm volatile("barrier.cta.sync %0, 128;" ::"r"(group + 1) : "memory");
}

// The compiler may not keep a copy of an accumulator beyond this line.
template <int N> __device__ __forceinline__ void pin(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// Registers go from the warp that copies to those that compute.
template <int COUNT> __device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

#define EIGHT(x, i)                                                                               \
    "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]),   \
        "+f"(x[i + 6]), "+f"(x[i + 7])
#define SIXTY_FOUR(x, i)                                                                          \
    EIGHT(x, i), EIGHT(x, i + 8), EIGHT(x, i + 16), EIGHT(x, i + 24), EIGHT(x, i + 32),           \
        EIGHT(x, i + 40), EIGHT(x, i + 48), EIGHT(x, i + 56)

__device__ __forceinline__ void multiply(float (&d)[128], u64 x, u64 w, int add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k32.f32.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "
        "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "
        "%125, %126, %127}, %128, %129, add, 1, 1;\n}"
        : SIXTY_FOUR(d, 0), SIXTY_FOUR(d, 64)
        : "l"(x), "l"(w), "r"(add));
}

__device__ __forceinline__ float tanh_of(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ unsigned short two_e4m3(float a, float b) {
    unsigned short packed;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %2, %1;" : "=h"(packed) : "f"(a), "f"(b));
    return packed;
}

// ---- The product -------------------------------------------------------------------------------

// Tiles in bands of GROUP rows of tiles, so that those at work at once share what they read.
struct Tile {
    int m, n;
    __device__ Tile(const Arguments &a, int tile) {
        int each = GROUP * a.n_tiles, first = tile / each * GROUP;
        int height = min(a.m_tiles - first, GROUP), inside = tile % each;
        m = first + inside % height;
        n = inside / height;
    }
};

__device__ __forceinline__ void copy(Shared &shared, const Arguments &a, const TensorMap &x_map,
                                     const TensorMap &w_map) {
    int step = 0;
    for (int tile = blockIdx.x; tile < a.m_tiles * a.n_tiles; tile += gridDim.x) {
        Tile place(a, tile);
#pragma unroll 1
        for (int k = 0; k < a.steps; ++k, ++step) {
            int stage = step % STAGES, parity = step / STAGES & 1;
            u64 &full = shared.full[stage];
            wait(shared.free[stage], parity ^ 1);
            expect(full, A_BYTES + B_BYTES);
            copy_tile(shared.a[stage], x_map, k * K_TILE, place.m * M_TILE, full);
            copy_tile(shared.b[stage], w_map, k * K_TILE, place.n * N_TILE, full);
        }
    }
}

// A warpgroup's 64 rows of a tile: the sums of its products. `step` counts on over tiles.
__device__ __forceinline__ void multiply_tile(Shared &shared, const Arguments &a, int group,
                                              int &step, float (&d)[128]) {
    auto release = [&](int one) {
        if (threadIdx.x % 32 == 0) arrive(shared.free[one % STAGES]);
    };
#pragma unroll 1
    for (int k = 0; k < a.steps; ++k, ++step) {
        int stage = step % STAGES;
        wait(shared.full[stage], step / STAGES & 1);
        fence();
        u64 x = descriptor(shared.a[stage] + group * 64 * K_TILE);
        u64 w = descriptor(shared.b[stage]);
#pragma unroll
        for (int i = 0; i < 4; ++i) multiply(d, x + 2 * i, w + 2 * i, k > 0 || i > 0);
        commit();
        if (k > 0) {
            wait_products<1>();
            release(step - 1);
        }
    }
    wait_products<0>();
    pin(d);
    release(step - 1);
}

__device__ __forceinline__ float gelu(float x) {
    float half = 0.5f * x;
    return fmaf(half, tanh_of(x * fmaf(0.035677408f * x, x, 0.79788456f)), half);
}

__device__ __forceinline__ float of_bfloat16(u32 bits) { return __uint_as_float(bits << 16); }

// Two rows of a thread: what their products are worth, and what their results are divided by.
struct Rows {
    float scale[2], factor[2];
    __device__ Rows(const Arguments &a, int row, bool tells) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int m = row + 8 * i;
            bool inside = m < a.m;
            scale[i] = inside ? a.x_scale[m] : 0.0f;
            float norm = inside ? a.x_norm[m] : 0.0f;
            float own = fmaxf(fmaf(norm, a.bound[0], a.bound[1]), 1e-30f);
            factor[i] = 1.0f / own;
            if (inside && tells) a.out_scale[m] = own;
        }
    }
};

// Sums → e4m3 in shared memory, swizzled as copies take it.
__device__ __forceinline__ void finish(char (&out)[2][64 * 128], const Arguments &a,
                                       const float (&d)[128], const Rows &rows, int column) {
    int lane = threadIdx.x % 32, local = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < 32; ++j) {
        int n = column + 8 * j + lane % 4 * 2;
        // Sides are multiples of 16: both columns are there, or none is.
        bool inside = n < a.n;
        float2 w_scale = inside ? *reinterpret_cast<const float2 *>(a.w_scale + n) : float2{};
        u32 bias = inside ? *reinterpret_cast<const u32 *>(a.bias + n) : 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float *sums = d + 4 * j + 2 * i;
            float left = fmaf(sums[0], rows.scale[i] * w_scale.x, of_bfloat16(bias & 0xffff));
            float right = fmaf(sums[1], rows.scale[i] * w_scale.y, of_bfloat16(bias >> 16));
            int row = local + 8 * i, place = (j % 16 / 2 ^ row % 8) * 16 + j % 2 * 8 + lane % 4 * 2;
            *reinterpret_cast<unsigned short *>(out[j / 16] + row * 128 + place) =
                two_e4m3(gelu(left) * rows.factor[i], gelu(right) * rows.factor[i]);
        }
    }
}

__device__ __forceinline__ void compute(Shared &shared, const Arguments &a,
                                        const TensorMap &out_map, int group) {
    int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32, step = 0;
    bool writes = threadIdx.x % 128 == 0;
    for (int tile = blockIdx.x; tile < a.m_tiles * a.n_tiles; tile += gridDim.x) {
        Tile place(a, tile);
        int row = place.m * M_TILE + group * 64, column = place.n * N_TILE;
        Rows rows(a, row + warp * 16 + lane / 4, place.n == 0 && lane % 4 == 0);
        float d[128];
        multiply_tile(shared, a, group, step, d);
        if (writes) wait_reads_of_writes();
        meet_warpgroup(group);
        finish(shared.out[group], a, d, rows, column);
        show_writes();
        meet_warpgroup(group);
        if (writes) {
            write_tile(out_map, shared.out[group][0], column, row);
            write_tile(out_map, shared.out[group][1], column + 128, row);
            commit_writes();
        }
    }
    if (writes) wait_writes();
}

extern "C" __global__ void __launch_bounds__(384, 1)
product(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map,
        const __grid_constant__ TensorMap out_map, const __grid_constant__ Arguments a) {
    extern __shared__ __align__(1024) char memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);
    int group = int(threadIdx.x) / 128 - 1;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            start_barrier(shared.full[stage], 1);
            start_barrier(shared.free[stage], 8);  // warps that compute
        }
        // Which copies see, too.
        show_writes();
    }
    __syncthreads();
    if (group < 0) {
        give_registers<40>();
        if (threadIdx.x == 0) copy(shared, a, x_map, w_map);
    } else {
        take_registers<232>();
        compute(shared, a, out_map, group);
    }
}
