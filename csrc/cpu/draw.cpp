// Operation 1 on the CPU: the draw of one section after the other.
//
// Every row is as likely to run as not, and a processor guesses such branches wrong half of the
// time: loops over rows write in any case and advance by a condition.
#include <algorithm>
#include <vector>

#include "table.h"

namespace layerprune {
namespace {

// What one section's draw needs room for, reused from section to section.
struct Scratch {
  explicit Scratch(int64_t batch)
      : words(4 * batch), keys(batch), nobody(batch), probe(batch), open(batch), runs(batch) {
    for (int i = 0; i < 4; ++i) word[i] = words.data() + i * batch;
  }
  std::vector<uint32_t> words;
  uint32_t* word[4];  // of every row
  std::vector<uint64_t> keys;
  std::vector<uint8_t> nobody, probe, open, runs;  // flags of every row
};

// Takes the rows with a flag out of the choice by word 0; returns how many are left.
int64_t exclude(const std::vector<uint8_t>& flag, uint32_t* word0) {
  uint32_t excluded = 0;
  const auto batch = static_cast<int64_t>(flag.size());
  for (int64_t row = 0; row < batch; ++row) {
    word0[row] |= 0u - flag[row];
    excluded += flag[row];
  }
  return batch - excluded;
}

// Probes, then open rows, then padding: what runs, and the gates of all but the probes.
void choose_systematic(const DrawParams& p, int64_t section, Scratch& s, float* gates) {
  const auto mark_least = cpu_kernels().mark_least;
  const Words reserved =
      row_words(stream_of(p.rng_state), static_cast<uint32_t>(section), kReservedRow);
  const SystematicCounts counts = systematic_counts(p.theta[section], p.probe_rate[section],
                                                    p.batch, reserved, p.min_rows, p.row_multiple);
  mark_least(s.word[1], s.nobody.data(), p.batch, p.batch, counts.probes, s.probe.data());
  const int64_t others = exclude(s.probe, s.word[0]);
  mark_least(s.word[0], s.probe.data(), p.batch, others, counts.open, s.open.data());
  for (int64_t row = 0; row < p.batch; ++row) gates[row] = static_cast<float>(s.open[row]);
  if (counts.running > counts.probes + counts.open) {
    mark_least(s.word[0], s.probe.data(), p.batch, others, counts.running - counts.probes,
               s.open.data());
  }
  for (int64_t row = 0; row < p.batch; ++row) s.runs[row] = s.probe[row] | s.open[row];
}

// The gates of the probes, which are `count` of the rows.
void stratify(const int64_t* probes, int64_t count, Scratch& s, float* gates) {
  for (int64_t i = 0; i < count; ++i) {
    s.keys[i] = rank_key(s.word[1][probes[i]], static_cast<uint32_t>(probes[i]));
  }
  std::sort(s.keys.begin(), s.keys.begin() + count);
  for (int64_t rank = 0; rank < count; ++rank) {
    const uint32_t row = row_of_key(s.keys[rank]);
    gates[row] = stratified_probe(rank, count, s.word[2][row]);
  }
}

// Gates row by row, then padding.
void choose_independent(const DrawParams& p, int64_t section, Scratch& s, float* gates) {
  for (int64_t row = 0; row < p.batch; ++row) {
    s.probe[row] = independent_probe(p.probe_rate[section], s.word[1][row]);
    const float between = clamp_probe(uniform(s.word[2][row]));
    const float either = independent_gate(p.theta[section], s.word[3][row]);
    gates[row] = s.probe[row] ? between : either;
    s.open[row] = gates[row] > 0.0f;
  }
  const int64_t others = exclude(s.open, s.word[0]), needed = p.batch - others;
  const int64_t padding = running_count(needed, p.min_rows, p.row_multiple, p.batch) - needed;
  cpu_kernels().mark_least(s.word[0], s.open.data(), p.batch, others, padding, s.runs.data());
  for (int64_t row = 0; row < p.batch; ++row) s.runs[row] |= s.open[row];
}

// Writes the rows with a flag, ascending, then -1; returns how many there are.
int64_t list_rows(const std::vector<uint8_t>& flag, int64_t* rows) {
  const auto batch = static_cast<int64_t>(flag.size());
  int64_t count = 0;
  for (int64_t row = 0; row < batch; ++row) {
    rows[count] = row;
    count += flag[row];
  }
  std::fill_n(rows + count, batch - count, int64_t{-1});
  return count;
}

}  // namespace

void draw_sections(const DrawParams& p, int64_t begin, int64_t end) {
  Scratch s(p.batch);
  for (int64_t section = begin; section < end; ++section) {
    cpu_kernels().row_words(stream_of(p.rng_state), static_cast<uint32_t>(section),
                            first_row_of(p.rng_state), p.batch, s.word);
    const int64_t first = section * p.batch;
    float* gates = p.gates + first;
    int64_t* counts = p.counts + 2 * section;
    (p.systematic ? choose_systematic : choose_independent)(p, section, s, gates);
    counts[0] = list_rows(s.runs, p.rows + first);
    counts[1] = list_rows(s.probe, p.probes + first);
    if (p.systematic) stratify(p.probes + first, counts[1], s, gates);
    int32_t slot = 0;
    for (int64_t row = 0; row < p.batch; ++row) {
      p.slots[first + row] = s.runs[row] ? slot : -1;
      slot += s.runs[row];
    }
  }
}

}  // namespace layerprune
