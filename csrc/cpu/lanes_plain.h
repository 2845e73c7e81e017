// Lanes of any processor: short loops that the compiler turns into the vectors it has. See lanes.h.

constexpr bool kNonTemporal = false;

static inline float to_float(float value) { return value; }
static inline double to_float(double value) { return value; }

static inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
static inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float to_float(BFloat16 value) { return float_of_bits(uint32_t{value.bits} << 16); }

static inline float to_float(Half value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = value.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) {  // infinite or not a number
    return float_of_bits(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  }
  // The multiplication moves the exponent's bias and normalises what float16 could not.
  return float_of_bits(sign | bits_of_float(float_of_bits(magnitude << 13) * 0x1p112f));
}

static inline void from_float(float* p, float value) { *p = value; }
static inline void from_float(double* p, double value) { *p = value; }

static inline void from_float(BFloat16* p, float value) {
  const uint32_t bits = bits_of_float(value);
  p->bits = value != value ? 0x7FC0u
                           : static_cast<uint16_t>((bits + ((bits >> 16) & 1u) + 0x7FFFu) >> 16);
}

static inline void from_float(Half* p, float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  uint32_t half;
  if (magnitude > 0x7F800000u) {
    half = 0x7E00u;
  } else if (magnitude >= 0x47800000u) {  // 2**16 and above
    half = 0x7C00u;
  } else if (magnitude >= 0x38800000u) {  // normal in float16; a carry may reach infinity
    half = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  } else {  // the sum rounds to multiples of 2**-24
    half = bits_of_float(float_of_bits(magnitude) + 0.5f) - bits_of_float(0.5f);
  }
  p->bits = static_cast<uint16_t>(sign | half);
}

template <typename A, int64_t lanes>
struct PlainLanes {
  static constexpr int64_t count = lanes;
  A v[lanes];
};
using FloatLanes = PlainLanes<float, 8>;
using DoubleLanes = PlainLanes<double, 4>;

template <typename A>
struct LanesOf {
  using type = FloatLanes;
};
template <>
struct LanesOf<double> {
  using type = DoubleLanes;
};

template <typename T>
static inline auto load(const T* p) {
  typename LanesOf<T>::type a;
  for (int64_t i = 0; i < a.count; ++i) a.v[i] = to_float(p[i]);
  return a;
}
template <bool, typename T, typename A, int64_t n>
static inline void store(T* p, PlainLanes<A, n> a) {
  for (int64_t i = 0; i < n; ++i) from_float(p + i, a.v[i]);
}
template <typename A>
static inline auto all(A value) {
  typename LanesOf<A>::type a;
  for (int64_t i = 0; i < a.count; ++i) a.v[i] = value;
  return a;
}
template <typename A, int64_t n>
static inline PlainLanes<A, n> operator+(PlainLanes<A, n> a, PlainLanes<A, n> b) {
  for (int64_t i = 0; i < n; ++i) a.v[i] += b.v[i];
  return a;
}
template <typename A, int64_t n>
static inline PlainLanes<A, n> operator-(PlainLanes<A, n> a, PlainLanes<A, n> b) {
  for (int64_t i = 0; i < n; ++i) a.v[i] -= b.v[i];
  return a;
}
template <typename A, int64_t n>
static inline PlainLanes<A, n> operator*(PlainLanes<A, n> a, PlainLanes<A, n> b) {
  for (int64_t i = 0; i < n; ++i) a.v[i] *= b.v[i];
  return a;
}
template <typename A, int64_t n>
static inline PlainLanes<A, n> multiply_add(PlainLanes<A, n> a, PlainLanes<A, n> b,
                                            PlainLanes<A, n> c) {
  return a * b + c;
}
template <typename A, int64_t n>
static inline PlainLanes<A, n> relu(PlainLanes<A, n> a) {
  for (int64_t i = 0; i < n; ++i) a.v[i] = a.v[i] < 0 ? 0 : a.v[i];
  return a;
}
template <typename A, int64_t n>
static inline PlainLanes<A, n> zero_unless_positive(PlainLanes<A, n> a, PlainLanes<A, n> y) {
  for (int64_t i = 0; i < n; ++i) a.v[i] = y.v[i] <= 0 ? 0 : a.v[i];
  return a;
}
template <typename A, int64_t n>
static inline A sum(PlainLanes<A, n> a) {
  for (int64_t width = n / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) a.v[i] += a.v[i + width];
  }
  return a.v[0];
}
static inline FloatLanes select(const bool* counted, FloatLanes a) {
  for (int64_t i = 0; i < a.count; ++i) a.v[i] = counted[i] ? a.v[i] : 0.0f;
  return a;
}

template <bool>
static inline void copy_bytes(void* out, const void* in, int64_t bytes) {
  std::memcpy(out, in, bytes);
}

static inline void finish_non_temporal() {}

struct WordLanes {
  static constexpr int64_t count = 1;
  WordLanes() = default;
  explicit WordLanes(uint32_t word) : v(word) {}
  static WordLanes from(uint32_t first) { return WordLanes(first); }
  uint32_t v;
};

static inline WordLanes operator^(WordLanes a, WordLanes b) { return WordLanes(a.v ^ b.v); }
static inline WordLanes operator^(WordLanes a, uint32_t b) { return WordLanes(a.v ^ b); }
static inline void multiply_wide(uint32_t a, WordLanes b, WordLanes* high, WordLanes* low) {
  layerprune::multiply_wide(a, b.v, &high->v, &low->v);
}
static inline void store(uint32_t* p, WordLanes a) { *p = a.v; }
