// What gelu_product.cu takes from CUDA and from the GPU beside block_on_cpu.h, for a CPU.

#ifdef BEFORE
static Place gridDim;
static float __uint_as_float(unsigned x) { return bits<float>(x); }
#endif

#ifdef INSTEAD_OF_PTX
static void write_tile(const TensorMap &map, const void *from, int x, int y) {
    const Map &to = *reinterpret_cast<const Map *>(&map);
    for (int row = 0; row < to.rows; ++row) {
        for (int i = 0; i < 128; ++i) {
            if (x + i >= to.size[0] || y + row >= to.size[1]) continue;
            const_cast<char *>(to.base)[(y + row) * to.stride[1] + x + i] =
                *swizzled((char *)from + row * 128 + i);
        }
    }
}
static void commit_writes() {}
static void wait_reads_of_writes() {}
static void wait_writes() {}
static void meet_warpgroup(int group) { pthread_barrier_wait(&of_group[group]); }
static void multiply(float (&d)[128], u64 x, u64 w, int add) {
    int first = threadIdx.x % 128 / 32 * 16 + lane_of() / 4;
    for (int i = 0; i < 128; ++i) {
        float sum = 0;
        for (int j = 0; j < 32; ++j) {
            sum += of_e4m3(at(x, (first + i / 2 % 2 * 8) * 128 + j)) * of_e4m3(at(w, column(i) * 128 + j));
        }
        d[i] = (add ? d[i] : 0) + sum;
    }
    meet();
}
static float tanh_of(float x) { return tanhf(x); }
#endif

#ifdef AFTER
extern "C" void run(int blocks, int, const Map *maps, const Arguments *a) {
    gridDim = {blocks, 1, 1};
    memory = (char *)aligned_alloc(1024, SHARED_BYTES);
    TensorMap tensor_maps[3] = {};
    for (int i = 0; i < 3; ++i) memcpy(&tensor_maps[i], maps + i, sizeof(Map));
    for (int warp = 0; warp < 12; ++warp) pthread_barrier_init(&of_warp[warp], 0, 32);
    for (pthread_barrier_t &one : of_group) pthread_barrier_init(&one, 0, 128);
    pthread_barrier_init(&of_block, 0, 384);
    for (int block = 0; block < blocks; ++block) {
        memset(memory, 0x7f, SHARED_BYTES);  // NaN, where something is read too early
        std::vector<std::thread> threads;
        for (int i = 0; i < 384; ++i) {
            threads.emplace_back([=, &tensor_maps] {
                threadIdx = {i, 0, 0};
                blockIdx = {block, 0, 0};
                product(tensor_maps[0], tensor_maps[1], tensor_maps[2], *a);
            });
        }
        for (std::thread &thread : threads) thread.join();
    }
    free(memory);
}
#endif
