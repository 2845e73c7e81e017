// Operation 1 on the CPU: the draw of one section after the other.
//
// Every row is as likely to run as not, and a processor guesses such branches wrong half of the
// time: loops over rows write in any case and advance by a condition.
#include <algorithm>
#include <vector>

#include "../parameters.h"

namespace layerprune {
namespace {

// What one section's draw needs room for, reused from section to section.
struct Scratch {
  explicit Scratch(int64_t batch)
      : words(4 * batch),
        others(batch),
        other_rows(batch),
        keys(batch),
        probe(batch),
        open(batch),
        runs(batch) {
    for (int i = 0; i < 4; ++i) word[i] = words.data() + i * batch;
  }
  std::vector<uint32_t> words;
  uint32_t* word[4];  // of every row
  std::vector<uint32_t> others, other_rows;
  std::vector<uint64_t> keys;
  std::vector<uint8_t> probe, open, runs;
};

// Collects word 0 and number of the rows whose flag is not set; returns how many there are.
int64_t collect_others(const std::vector<uint8_t>& flag, Scratch& scratch) {
  int64_t count = 0;
  for (size_t row = 0; row < flag.size(); ++row) {
    scratch.others[count] = scratch.word[0][row];
    scratch.other_rows[count] = static_cast<uint32_t>(row);
    count += 1 - flag[row];
  }
  return count;
}

// Probes, then open rows, then padding: sets gates and what runs.
void draw_systematic(const DrawParams& p, int64_t section, Scratch& scratch, float* gates) {
  const auto mark_least = cpu_kernels().mark_least;
  const Words reserved = row_words(p.stream, static_cast<uint32_t>(section), kReservedRow);
  const SystematicCounts counts = systematic_counts(p.theta[section], p.probe_rate[section],
                                                    p.batch, reserved, p.min_rows, p.row_multiple);
  mark_least(scratch.word[1], p.batch, counts.probes, scratch.probe.data());
  const int64_t others = collect_others(scratch.probe, scratch);
  mark_least(scratch.others.data(), others, counts.open, scratch.open.data());
  std::copy(scratch.probe.begin(), scratch.probe.end(), scratch.runs.begin());
  for (int64_t i = 0; i < others; ++i) {
    gates[scratch.other_rows[i]] = static_cast<float>(scratch.open[i]);
  }
  if (counts.running > counts.probes + counts.open) {
    mark_least(scratch.others.data(), others, counts.running - counts.probes, scratch.open.data());
  }
  for (int64_t i = 0; i < others; ++i) scratch.runs[scratch.other_rows[i]] = scratch.open[i];

  if (counts.probes == 0) return;
  int64_t found = 0;
  for (int64_t row = 0; row < p.batch; ++row) {
    scratch.keys[found] = rank_key(scratch.word[1][row], static_cast<uint32_t>(row));
    found += scratch.probe[row];
  }
  std::sort(scratch.keys.begin(), scratch.keys.begin() + found);
  for (int64_t rank = 0; rank < found; ++rank) {
    const uint32_t row = row_of_key(scratch.keys[rank]);
    gates[row] = stratified_probe(rank, found, scratch.word[2][row]);
  }
}

void draw_independent(const DrawParams& p, int64_t section, Scratch& scratch, float* gates) {
  int64_t needed = 0;
  for (int64_t row = 0; row < p.batch; ++row) {
    const bool probe = independent_probe(p.probe_rate[section], scratch.word[1][row]);
    const float between = clamp_probe(uniform(scratch.word[2][row]));
    const float either = independent_gate(p.theta[section], scratch.word[3][row]);
    gates[row] = probe ? between : either;
    scratch.runs[row] = gates[row] > 0.0f;
    needed += scratch.runs[row];
  }
  const int64_t padding = running_count(needed, p.min_rows, p.row_multiple, p.batch) - needed;
  if (padding == 0) return;
  const int64_t others = collect_others(scratch.runs, scratch);
  cpu_kernels().mark_least(scratch.others.data(), others, padding, scratch.open.data());
  for (int64_t i = 0; i < others; ++i) scratch.runs[scratch.other_rows[i]] = scratch.open[i];
}

// From gates and what runs: slots, the two lists and their counts.
void list_rows(const DrawParams& p, int64_t section, const std::vector<uint8_t>& runs,
               const float* gates) {
  const int64_t first = section * p.batch;
  int32_t* slots = p.slots + first;
  int64_t *rows = p.rows + first, *probes = p.probes + first;
  int64_t ran = 0, probed = 0;
  for (int64_t row = 0; row < p.batch; ++row) {
    slots[row] = static_cast<int32_t>(runs[row] ? ran : -1);
    rows[ran] = row;
    ran += runs[row];
    // A probe's gate lies strictly between 0 and 1, and no other does.
    probes[probed] = row;
    probed += static_cast<int64_t>(gates[row] > 0.0f) & static_cast<int64_t>(gates[row] < 1.0f);
  }
  std::fill_n(rows + ran, p.batch - ran, int64_t{-1});
  std::fill_n(probes + probed, p.batch - probed, int64_t{-1});
  p.counts[2 * section] = ran;
  p.counts[2 * section + 1] = probed;
}

}  // namespace

void draw_sections(const DrawParams& p, int64_t begin, int64_t end) {
  Scratch scratch(p.batch);
  for (int64_t section = begin; section < end; ++section) {
    cpu_kernels().row_words(p.stream, static_cast<uint32_t>(section), p.first_row, p.batch,
                            scratch.word);
    float* gates = p.gates + section * p.batch;
    (p.systematic ? draw_systematic : draw_independent)(p, section, scratch, gates);
    list_rows(p, section, scratch.runs, gates);
  }
}

}  // namespace layerprune
