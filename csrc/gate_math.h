// The mathematics of gates, for one row or one section at a time, written once for host and device.
//
// layerprune/ops/{philox,draw,projected_step}.py specify these functions; the draw is equal to them
// bit for bit. Internal linkage throughout: files that include this are compiled for different
// instruction sets, and the linker must not merge their copies.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define LAYERPRUNE_HOST_DEVICE __host__ __device__
#else
#define LAYERPRUNE_HOST_DEVICE
#endif
#define LAYERPRUNE_INLINE LAYERPRUNE_HOST_DEVICE static inline

namespace layerprune {

// ---- The random stream: Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011) ----

constexpr uint32_t kReservedRow = 0xFFFFFFFFu;  // its words belong to the section as a whole

// Where a draw reads the stream: the key is the seed, the counter (draw number, section, row).
struct Stream {
  uint64_t seed;
  uint64_t draw;
};

// Of rng_state: seed, draw number, global row of the batch's first row.
LAYERPRUNE_INLINE Stream stream_of(const int64_t* rng_state) {
  return {static_cast<uint64_t>(rng_state[0]), static_cast<uint64_t>(rng_state[1])};
}

LAYERPRUNE_INLINE uint32_t first_row_of(const int64_t* rng_state) {
  return static_cast<uint32_t>(rng_state[2]);
}

// The four words of one counter or of one result; with a vector type for Word, of several.
template <typename Word>
struct PhiloxWords {
  Word word[4];
};
using Words = PhiloxWords<uint32_t>;

// 32 by 32 bits; host code has an overload for a vector of words.
LAYERPRUNE_INLINE void multiply_wide(uint32_t a, uint32_t b, uint32_t* high, uint32_t* low) {
  const uint64_t product = uint64_t{a} * b;
  *high = static_cast<uint32_t>(product >> 32);
  *low = static_cast<uint32_t>(product);
}

template <typename Word>
LAYERPRUNE_INLINE PhiloxWords<Word> philox_4x32_10(PhiloxWords<Word> counter, uint32_t key0,
                                                   uint32_t key1) {
  Word c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
  for (int round = 0; round < 10; ++round) {
    Word high0, high1, low0, low1;
    multiply_wide(0xD2511F53u, c0, &high0, &low0);
    multiply_wide(0xCD9E8D57u, c2, &high1, &low1);
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The words of one row of a section, or with a vector for `row` of several.
template <typename Word>
LAYERPRUNE_INLINE PhiloxWords<Word> row_words(Stream stream, uint32_t section, Word row) {
  const PhiloxWords<Word> counter = {{Word(static_cast<uint32_t>(stream.draw)),
                                      Word(static_cast<uint32_t>(stream.draw >> 32)), Word(section),
                                      row}};
  return philox_4x32_10(counter, static_cast<uint32_t>(stream.seed),
                        static_cast<uint32_t>(stream.seed >> 32));
}

// In [0, 1): the upper 24 bits, exactly, times 2**-24.
LAYERPRUNE_INLINE float uniform(uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24f; }

// ---- The draw. Word 0 ranks rows for the Bernoulli choice, word 1 for the choice of probes, ----
// ---- word 2 gives a probe's gate, word 3 decides in the independent scheme.                 ----

// Rows are ranked by (word, row): the row breaks ties.
LAYERPRUNE_INLINE uint64_t rank_key(uint32_t word, uint32_t row) {
  return (uint64_t{word} << 32) | row;
}

LAYERPRUNE_INLINE uint32_t row_of_key(uint64_t key) { return static_cast<uint32_t>(key); }

constexpr int64_t kMostRows = int64_t{1} << 29;  // a batch has fewer

// floor(rate * total + u), at most total. The product of 24 and 29 bits is exact in float64, so
// that contracting it with the sum into one instruction changes nothing.
LAYERPRUNE_INLINE int64_t random_count(float rate, int64_t total, uint32_t word) {
  const double count = std::floor(static_cast<double>(rate) * static_cast<double>(total) +
                                  static_cast<double>(uniform(word)));
  const int64_t whole = static_cast<int64_t>(count);
  return whole < total ? whole : total;
}

// A probe's gate lies strictly between 0 and 1.
LAYERPRUNE_INLINE float clamp_probe(float gate) {
  const float least = 0x1p-25f, greatest = 1.0f - 0x1p-24f;
  return gate < least ? least : gate > greatest ? greatest : gate;
}

// Systematic scheme: the gate of the probe of a rank among `count` probes, stratified over (0, 1).
LAYERPRUNE_INLINE float stratified_probe(int64_t rank, int64_t count, uint32_t word2) {
  return clamp_probe((static_cast<float>(rank) + uniform(word2)) / static_cast<float>(count));
}

// Independent scheme.
LAYERPRUNE_INLINE bool independent_probe(float probe_rate, uint32_t word1) {
  return uniform(word1) < probe_rate;
}

LAYERPRUNE_INLINE float independent_gate(float theta, uint32_t word3) {
  return uniform(word3) < theta ? 1.0f : 0.0f;
}

// Rows that run where `needed` rows have an open gate: padded to min_rows and to a multiple.
LAYERPRUNE_INLINE int64_t running_count(int64_t needed, int64_t min_rows, int64_t row_multiple,
                                        int64_t batch) {
  const int64_t least = needed > min_rows ? needed : min_rows;
  if (least >= batch) return batch;
  const int64_t over = least % row_multiple;
  if (over == 0) return least;
  return row_multiple - over < batch - least ? least + row_multiple - over : batch;
}

// How many rows of a section are probes, open and running under the systematic scheme.
struct SystematicCounts {
  int64_t probes;
  int64_t open;
  int64_t running;
};

LAYERPRUNE_INLINE SystematicCounts systematic_counts(float theta, float probe_rate, int64_t batch,
                                                     Words reserved, int64_t min_rows,
                                                     int64_t row_multiple) {
  const int64_t probes = random_count(probe_rate, batch, reserved.word[1]);
  const int64_t open = random_count(theta, batch - probes, reserved.word[0]);
  return {probes, open, running_count(probes + open, min_rows, row_multiple, batch)};
}

// ---- The projected step of one section ----

// Sums over the steps that brought evidence, decayed by age; `rows` weighs a step by its rows.
struct Statistics {
  float steps;
  float rows;
  float squares;  // rows under squared weights
  float mean;
  float deviations;
};

struct StepOptions {
  float horizon;
  float noise_factor;
  float decay;
  float confidence;
};

// West's update of a weighted mean and variance by the mean of some rows.
LAYERPRUNE_INLINE Statistics with_evidence(Statistics old, float estimate, float rows,
                                           float decay) {
  const float weight = decay * old.rows + rows;
  const float before = estimate - old.mean;
  const float mean = old.mean + before * rows / weight;
  return {decay * old.steps + 1.0f, weight, decay * decay * old.squares + rows, mean,
          decay * old.deviations + rows * before * (estimate - mean)};
}

// Variance of one row's slope about the mean, from the spread between steps; 0 before the second.
LAYERPRUNE_INLINE float row_variance(Statistics s) {
  const float freedom = s.steps - s.squares / (s.rows > 1e-12f ? s.rows : 1e-12f);
  const float variance = s.deviations / (freedom > 1e-3f ? freedom : 1e-3f);
  return freedom > 1e-3f ? variance : 0.0f;
}

// Standard error of the mean; infinite before the second step.
LAYERPRUNE_INLINE float standard_error(Statistics s) {
  const float error = std::sqrt(row_variance(s) * s.squares) / (s.rows > 1e-12f ? s.rows : 1e-12f);
  return s.steps > 1.0f ? error : INFINITY;
}

// theta - (g + nu) / (nu h), clipped, with h = max(horizon, noise_factor * var(g) / nu^2).
LAYERPRUNE_INLINE float projected_theta(float theta, float estimate, float penalty,
                                        float estimate_variance, StepOptions options) {
  const float noisy = options.noise_factor * estimate_variance / (penalty * penalty);
  const float duration = noisy > options.horizon ? noisy : options.horizon;
  const float moved = theta - (estimate + penalty) / (penalty * duration);
  return moved < 0.0f ? 0.0f : moved > 1.0f ? 1.0f : moved;
}

// The competition looks at the running g + nu: a section falls where it is positive, and one that
// is held rises only where its upper confidence bound is negative.
LAYERPRUNE_INLINE float excess(Statistics s, float penalty) { return s.mean + penalty; }

LAYERPRUNE_INLINE float excess_bound(Statistics s, float penalty, float confidence) {
  return excess(s, penalty) + confidence * standard_error(s);
}

}  // namespace layerprune
