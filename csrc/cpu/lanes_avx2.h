// Lanes of AVX2, FMA and F16C. See lanes.h.

constexpr bool kNonTemporal = true;  // whether there are stores past the caches

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

template <bool non_temporal>
static inline void store(float* p, FloatLanes a) {
  if constexpr (non_temporal) {
    _mm256_stream_ps(p, a.v);
  } else {
    _mm256_storeu_ps(p, a.v);
  }
}

template <bool non_temporal>
static inline void store_bits(void* p, __m128i bits) {
  if constexpr (non_temporal) {
    _mm_stream_si128(static_cast<__m128i*>(p), bits);
  } else {
    _mm_storeu_si128(static_cast<__m128i*>(p), bits);
  }
}

template <bool non_temporal>
static inline void store(Half* p, FloatLanes a) {
  store_bits<non_temporal>(p, _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

template <bool non_temporal>
static inline void store(BFloat16* p, FloatLanes a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  // To the nearest, ties to even; not a number stays one.
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7FFF));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i upper =
      _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000), nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(upper, upper), 0xD8);
  store_bits<non_temporal>(p, _mm256_castsi256_si128(packed));
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
template <bool non_temporal>
static inline void store(double* p, DoubleLanes a) {
  if constexpr (non_temporal) {
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

// Past the caches a multiple of 32 bytes.
template <bool non_temporal>
static inline void copy_bytes(void* out, const void* in, int64_t bytes) {
  if constexpr (non_temporal) {
    auto* to = static_cast<__m256i*>(out);
    const auto* from = static_cast<const __m256i*>(in);
    for (int64_t i = 0; i < bytes / 32; ++i) {
      _mm256_stream_si256(to + i, _mm256_loadu_si256(from + i));
    }
  } else {
    std::memcpy(out, in, bytes);
  }
}

static inline void finish_non_temporal() { _mm_sfence(); }

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
