// What our kernels use of the Metal Shading Language, in C++14. metal_emulator.cpp runs their threads.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

struct uint3 { unsigned x, y, z; };
struct bfloat16_t {  // without implicit conversions, so that a kernel has to say where it rounds
  uint16_t bits;
  explicit bfloat16_t(float x) {
    uint32_t all;
    memcpy(&all, &x, 4);
    bits = x != x ? 0x7fc0 : (all + 0x7fff + (all >> 16 & 1)) >> 16;
  }
  explicit operator float() const {
    const uint32_t all = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &all, 4);
    return x;
  }
};
struct float16_t {
  _Float16 bits;
  explicit float16_t(float x) : bits(_Float16(x)) {}
  explicit operator float() const { return float(bits); }
};

namespace machine {
struct Place {
  uint3 thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
  unsigned thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
};
struct Any {  // an argument, in memory of its exact size
  void* at;
  template <typename P> operator P*() const { return static_cast<P*>(at); }
};
void barrier();
float of_simd(float x, float (*join)(float, float));
void poison(void* memory, size_t bytes);  // once per threadgroup
template <typename A> void fresh(A& array) { poison(&array, sizeof array); }
void kernel(const Any* b, const Place& place);  // calls the one to run
}  // namespace machine

namespace metal {
enum class mem_flags { mem_none, mem_device, mem_threadgroup };
inline float fmax(float a, float b) { return a != a || a < b ? b : a; }
inline int min(int a, int b) { return a < b ? a : b; }
inline float simd_sum(float x) { return machine::of_simd(x, [](float a, float b) { return a + b; }); }
inline float simd_max(float x) { return machine::of_simd(x, fmax); }
namespace fast {
inline float exp(float x) { return std::exp(x); }
}  // namespace fast
namespace precise {
inline float exp(float x) { return std::exp(x); }
inline float log(float x) { return std::log(x); }
inline float rsqrt(float x) { return 1 / std::sqrt(x); }
}  // namespace precise
}  // namespace metal
inline void threadgroup_barrier(metal::mem_flags) { machine::barrier(); }

// threadgroup: where it declares memory, metal_emulator.py has written static
#define device
#define constant
#define thread
#define threadgroup
