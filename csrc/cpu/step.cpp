// Operation 4 on the CPU: evidence and projection section by section, then the competition.
#include <algorithm>
#include <limits>
#include <vector>

#include "../parameters.h"

namespace layerprune {
namespace {

Statistics read(const StepParams& p, int64_t section) {
  const float* s = p.statistics + section;
  const int64_t n = p.sections;
  return {s[0], s[n], s[2 * n], s[3 * n], s[4 * n]};
}

void write(const StepParams& p, int64_t section, Statistics value) {
  float* s = p.statistics + section;
  const int64_t n = p.sections;
  s[0] = value.steps;
  s[n] = value.rows;
  s[2 * n] = value.squares;
  s[3 * n] = value.mean;
  s[4 * n] = value.deviations;
}

}  // namespace

void step_sections(const StepParams& p, float* moved, int64_t begin, int64_t end) {
  const auto counted_sum = cpu_kernels().counted_sum;
  for (int64_t section = begin; section < end; ++section) {
    const int64_t first = section * p.rows;
    float sum, rows;
    counted_sum(p.slope + first, p.counted + first, p.rows, &sum, &rows);
    moved[section] = p.theta[section];
    if (rows == 0.0f) continue;
    const float estimate = sum / rows;
    const Statistics now = with_evidence(read(p, section), estimate, rows, p.options.decay);
    write(p, section, now);
    moved[section] = projected_theta(p.theta[section], estimate, p.penalty[section],
                                     row_variance(now) / rows, p.options);
  }
}

void compete(const StepParams& p, const float* moved) {
  if (p.max_descending < 0) {
    for (int64_t section = 0; section < p.sections; ++section) {
      p.in_play[section] = p.free[section];
      if (p.free[section]) p.theta[section] = moved[section];
    }
    return;
  }
  // Those in play keep their places while they should fall; free places go to the largest excess.
  struct Candidate {
    bool playing;
    float excess;
    int64_t section;
  };
  std::vector<Candidate> falling;
  for (int64_t section = 0; section < p.sections; ++section) {
    const Statistics s = read(p, section);
    if (p.free[section] && should_fall(s, p.penalty[section])) {
      falling.push_back({p.in_play[section], s.mean + p.penalty[section], section});
    }
  }
  const auto places = std::min<int64_t>(p.max_descending, falling.size());
  std::partial_sort(falling.begin(), falling.begin() + places, falling.end(),
                    [](const Candidate& a, const Candidate& b) {
                      if (a.playing != b.playing) return a.playing;
                      if (a.excess != b.excess) return a.excess > b.excess;
                      return a.section < b.section;
                    });
  std::fill_n(p.in_play, p.sections, false);
  for (int64_t i = 0; i < places; ++i) p.in_play[falling[i].section] = true;
  for (int64_t section = 0; section < p.sections; ++section) {
    const bool allowed =
        p.in_play[section] ||
        (p.free[section] &&
         may_rise(read(p, section), p.penalty[section], p.options.confidence));
    if (allowed) p.theta[section] = moved[section];
  }
}

}  // namespace layerprune
