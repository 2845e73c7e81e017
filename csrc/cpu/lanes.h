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

constexpr bool kStreams = true;  // whether there are stores past the caches

struct FloatLanes {
  static constexpr int64_t count = 8;
  __m256 v;
};

static inline FloatLanes load(const float* p) { return {_mm256_loadu_ps(p)}; }

static inline FloatLanes load(const Half* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}

static inline FloatLanes load(const BFloat16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}

template <bool stream>
static inline void store(float* p, FloatLanes a) {
  if constexpr (stream) {
    _mm256_stream_ps(p, a.v);
  } else {
    _mm256_storeu_ps(p, a.v);
  }
}

template <bool stream>
static inline void store_bits(void* p, __m128i bits) {
  if constexpr (stream) {
    _mm_stream_si128(static_cast<__m128i*>(p), bits);
  } else {
    _mm_storeu_si128(static_cast<__m128i*>(p), bits);
  }
}

template <bool stream>
static inline void store(Half* p, FloatLanes a) {
  store_bits<stream>(p, _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

template <bool stream>
static inline void store(BFloat16* p, FloatLanes a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  // To the nearest, ties to even; not a number stays one.
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7FFF));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i upper =
      _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000), nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(upper, upper), 0xD8);
  store_bits<stream>(p, _mm256_castsi256_si128(packed));
}

static inline FloatLanes all(float value) { return {_mm256_set1_ps(value)}; }
static inline FloatLanes operator+(FloatLanes a, FloatLanes b) { return {_mm256_add_ps(a.v, b.v)}; }
static inline FloatLanes operator-(FloatLanes a, FloatLanes b) { return {_mm256_sub_ps(a.v, b.v)}; }
static inline FloatLanes operator*(FloatLanes a, FloatLanes b) { return {_mm256_mul_ps(a.v, b.v)}; }
static inline FloatLanes multiply_add(FloatLanes a, FloatLanes b, FloatLanes c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
// The second operand where either is not a number: ReLU hands it on.
static inline FloatLanes relu(FloatLanes a) { return {_mm256_max_ps(_mm256_setzero_ps(), a.v)}; }
static inline FloatLanes zero_unless_positive(FloatLanes a, FloatLanes y) {
  return {_mm256_and_ps(a.v, _mm256_cmp_ps(y.v, _mm256_setzero_ps(), _CMP_NLE_UQ))};
}
static inline float sum(FloatLanes a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
// Where the byte is not 0.
static inline FloatLanes select(const bool* counted, FloatLanes a) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(counted));
  const __m256i off = _mm256_cmpeq_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_setzero_si256());
  return {_mm256_andnot_ps(_mm256_castsi256_ps(off), a.v)};
}

struct DoubleLanes {
  static constexpr int64_t count = 4;
  __m256d v;
};

static inline DoubleLanes load(const double* p) { return {_mm256_loadu_pd(p)}; }
template <bool stream>
static inline void store(double* p, DoubleLanes a) {
  if constexpr (stream) {
    _mm256_stream_pd(p, a.v);
  } else {
    _mm256_storeu_pd(p, a.v);
  }
}
static inline DoubleLanes all(double value) { return {_mm256_set1_pd(value)}; }
static inline DoubleLanes operator+(DoubleLanes a, DoubleLanes b) {
  return {_mm256_add_pd(a.v, b.v)};
}
static inline DoubleLanes operator-(DoubleLanes a, DoubleLanes b) {
  return {_mm256_sub_pd(a.v, b.v)};
}
static inline DoubleLanes operator*(DoubleLanes a, DoubleLanes b) {
  return {_mm256_mul_pd(a.v, b.v)};
}
static inline DoubleLanes multiply_add(DoubleLanes a, DoubleLanes b, DoubleLanes c) {
  return {_mm256_fmadd_pd(a.v, b.v, c.v)};
}
static inline DoubleLanes relu(DoubleLanes a) { return {_mm256_max_pd(_mm256_setzero_pd(), a.v)}; }
static inline DoubleLanes zero_unless_positive(DoubleLanes a, DoubleLanes y) {
  return {_mm256_and_pd(a.v, _mm256_cmp_pd(y.v, _mm256_setzero_pd(), _CMP_NLE_UQ))};
}
static inline double sum(DoubleLanes a) {
  const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
}

static inline void finish_streaming() { _mm_sfence(); }

// Twice as many as a vector holds: the rounds of the generator are a chain, and a processor does
// better with two of them.
struct WordLanes {
  static constexpr int64_t count = 16;
  WordLanes() = default;
  WordLanes(__m256i first, __m256i second) : v{first, second} {}
  explicit WordLanes(uint32_t word) { v[0] = v[1] = _mm256_set1_epi32(static_cast<int>(word)); }
  static WordLanes from(uint32_t first) {
    const __m256i step = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return {_mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(first)), step),
            _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(first + 8)), step)};
  }
  __m256i v[2];
};

static inline WordLanes operator^(WordLanes a, WordLanes b) {
  return {_mm256_xor_si256(a.v[0], b.v[0]), _mm256_xor_si256(a.v[1], b.v[1])};
}
static inline WordLanes operator^(WordLanes a, uint32_t b) { return a ^ WordLanes(b); }
static inline void multiply_wide(__m256i factor, __m256i b, __m256i* high, __m256i* low) {
  const __m256i even = _mm256_mul_epu32(b, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(b, 32), factor);
  *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  *low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}
static inline void multiply_wide(uint32_t a, WordLanes b, WordLanes* high, WordLanes* low) {
  const __m256i factor = _mm256_set1_epi32(static_cast<int>(a));
  multiply_wide(factor, b.v[0], high->v, low->v);
  multiply_wide(factor, b.v[1], high->v + 1, low->v + 1);
}
static inline void store(uint32_t* p, WordLanes a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v[0]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), a.v[1]);
}

#else  // Any processor: short loops that the compiler turns into the vectors it has.

constexpr bool kStreams = false;

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

static inline void finish_streaming() {}

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
