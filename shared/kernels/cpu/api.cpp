// The C interface: picks the instruction set and hands calls on.
#include "cores.h"
#include "kernels.h"

using slipstream::Kernels;

Kernels scalar_kernels();
#if defined(__x86_64__)
Kernels avx2_kernels();
Kernels avx512_kernels();
#endif

namespace {

struct Handle {
    Kernels kernels;
    void* engine;
};

}  // namespace

extern "C" {

int32_t sl_abi(void) { return SL_ABI; }

int32_t sl_share(const sl_cores* cores, uint64_t now_ns, int32_t* first) {
    slipstream::Share share = slipstream::share_at(*cores, now_ns);
    *first = share.first;
    return share.count;
}

int32_t sl_best_isa(void) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
        return SL_ISA_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return SL_ISA_AVX2;
#endif
    return SL_ISA_SCALAR;
}

void* sl_create(const sl_model* model, int32_t num_threads, int32_t isa) {
    if (isa > sl_best_isa() || num_threads < 1) return nullptr;
    Kernels kernels = scalar_kernels();
#if defined(__x86_64__)
    if (isa == SL_ISA_AVX2) kernels = avx2_kernels();
    if (isa == SL_ISA_AVX512) kernels = avx512_kernels();
#endif
    try {
        return new Handle{kernels, kernels.create(model, num_threads)};
    } catch (...) {  // no memory, or no more threads; nothing may be thrown into C
        return nullptr;
    }
}

void sl_destroy(void* engine) {
    Handle* handle = (Handle*)engine;
    handle->kernels.destroy(handle->engine);
    delete handle;
}

int32_t sl_run(void* engine, const sl_step* step) {
    Handle* handle = (Handle*)engine;
    try {
        return handle->kernels.run(handle->engine, step);
    } catch (...) {
        return -1;
    }
}

int32_t sl_guess(void* engine, const sl_chains* chains) {
    Handle* handle = (Handle*)engine;
    try {
        return handle->kernels.guess(handle->engine, chains);
    } catch (...) {
        return -1;
    }
}

const float* sl_hidden(void* engine) {
    Handle* handle = (Handle*)engine;
    return handle->kernels.hidden(handle->engine);
}

int32_t sl_matmul(void* engine, const sl_matrix* matrix, const float* rows, int32_t num_rows, float* out) {
    Handle* handle = (Handle*)engine;
    try {
        return handle->kernels.matmul(handle->engine, matrix, rows, num_rows, out);
    } catch (...) {
        return -1;
    }
}

void sl_draw(void* engine, const sl_step* step, int32_t vocab_size) { ((Handle*)engine)->kernels.draw(step, vocab_size); }
}
