// Run-time choice among instruction sets. The module is compiled for the plain architecture; a hot function is compiled
// once more for each level by a target attribute, and picked by isa():
//
//     template <typename T> CLK_INLINE void body(...);                // the loop, written once
//     CLK_TARGET_AVX512 static void body_avx512(...) { body(...); }   // inlined and vectorised anew for each target
//     CLK_TARGET_AVX2 static void body_avx2(...) { body(...); }
//
//     switch (isa()) {
//         case Isa::avx512: return body_avx512(...);
//         case Isa::avx2: return body_avx2(...);
//         default: return body(...);
//     }
//
// OpenMP pragmas stand in the target function or around the call, never in the inlined body: there the region would be
// outlined before it is inlined, and stay at the base level.
#pragma once

#include <atomic>

#if defined(__x86_64__) && defined(__GNUC__)
#define CLK_X86 1
#define CLK_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define CLK_TARGET_AVX512 \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")))
#else
#define CLK_X86 0
#define CLK_TARGET_AVX2
#define CLK_TARGET_AVX512
#endif

#if defined(__GNUC__)
#define CLK_INLINE inline __attribute__((always_inline))
#else
#define CLK_INLINE inline
#endif

namespace clk {

enum class Isa : int { base = 0, avx2 = 1, avx512 = 2 };

// What this processor (and its operating system) can run.
inline Isa detected_isa() {
#if CLK_X86
    static const Isa level = [] {
        __builtin_cpu_init();
        const bool avx2 =
            __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
        const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        return avx2 ? (avx512 ? Isa::avx512 : Isa::avx2) : Isa::base;
    }();
    return level;
#else
    return Isa::base;
#endif
}

inline std::atomic<int>& isa_limit() {
    static std::atomic<int> limit{static_cast<int>(Isa::avx512)};
    return limit;
}

// The level to use: what is there, cut by limit_isa(), so that a test can run every variant on one machine.
inline Isa isa() {
    const int limit = isa_limit().load(std::memory_order_relaxed);
    const int found = static_cast<int>(detected_isa());
    return static_cast<Isa>(found < limit ? found : limit);
}

}  // namespace clk
