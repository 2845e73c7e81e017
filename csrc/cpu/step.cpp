// Operation 4 on the CPU: the competition between sections.
#include <algorithm>
#include <vector>

#include "table.h"

namespace layerprune {

void compete(const StepParams& p, const float* moved) {
  const int64_t n = p.sections;
  if (p.max_descending < 0) {
    for (int64_t section = 0; section < n; ++section) {
      p.in_play[section] = p.free[section];
      p.theta[section] = p.free[section] ? moved[section] : p.theta[section];
    }
    return;
  }
  std::vector<float> excess(n), bound(n);
  cpu_kernels().standing(p, excess.data(), bound.data());

  // Those in play keep their places while they should fall; free places go to the largest excess.
  std::vector<int64_t> falling(n);
  int64_t many = 0;
  for (int64_t section = 0; section < n; ++section) {
    const bool known = p.statistics[section] > 0.0f;  // any step with evidence
    falling[many] = section;
    many += p.free[section] & known & (excess[section] > 0.0f);
  }
  falling.resize(many);
  const auto places = std::min(p.max_descending, many);
  std::partial_sort(falling.begin(), falling.begin() + places, falling.end(),
                    [&](int64_t a, int64_t b) {
                      if (p.in_play[a] != p.in_play[b]) return p.in_play[a];
                      if (excess[a] != excess[b]) return excess[a] > excess[b];
                      return a < b;
                    });
  std::fill_n(p.in_play, n, false);
  for (int64_t i = 0; i < places; ++i) p.in_play[falling[i]] = true;
  for (int64_t section = 0; section < n; ++section) {
    const bool allowed = p.in_play[section] || (p.free[section] && bound[section] < 0.0f);
    p.theta[section] = allowed ? moved[section] : p.theta[section];
  }
}

}  // namespace layerprune
