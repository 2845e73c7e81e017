// A few lanes of numbers: what an instruction set offers for element-wise work in the accumulation
// type. Included inside a namespace of each instruction set, after the system's headers.

// Low-precision elements, as bits.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename T>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};

#ifdef LAYERPRUNE_AVX2
#include "lanes_avx2.h"
#else
#include "lanes_plain.h"
#endif

// The last few of a row: lanes beyond `count` are 0 when read and not written.
template <typename T>
static inline auto load_part(const T* p, int64_t count) {
  T buffer[8] = {};
  std::memcpy(buffer, p, count * sizeof(T));
  return load(buffer);
}
template <typename T, typename Lanes>
static inline void store_part(T* p, Lanes a, int64_t count) {
  T buffer[8];
  store<false>(buffer, a);
  std::memcpy(p, buffer, count * sizeof(T));
}
