// Operations 1 and 4, the draw and the projected step of all sections.
#include <algorithm>
#include <utility>
#include <vector>

#include "device.h"
#include "operators.h"

namespace layerprune {
namespace {

// A tensor that is written to: itself where it is contiguous, else a copy that `finish` copies
// back.
class Updated {
 public:
  Updated(const char* name, Tensor tensor, const Tensor& like, ScalarType type,
          std::initializer_list<int64_t> shape)
      : original_(tensor), dense_(checked(name, tensor, like, type, shape)) {
    std::vector<std::pair<int64_t, int64_t>> steps;  // stride and size, from the innermost outwards
    for (int64_t d = 0; d < tensor.dim(); ++d) {
      if (tensor.size(d) > 1) steps.emplace_back(tensor.stride(d), tensor.size(d));
    }
    std::sort(steps.begin(), steps.end());
    int64_t last = 0;  // the farthest element of the inner dimensions
    for (const auto& [stride, size] : steps) {
      check(stride > last, name, " is updated in place, but elements of it share memory");
      last += stride * (size - 1);
    }
  }
  template <typename T>
  T* data() {
    return write<T>(dense_);
  }
  void finish() {
    if (!original_.is_contiguous()) torch::stable::copy_(original_, dense_);
  }

 private:
  Tensor original_;
  Tensor dense_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sample_gates(
    const Tensor& theta, int64_t batch, const Tensor& rng_state, const Tensor& probe_rate,
    int64_t min_rows, int64_t row_multiple, const std::string& scheme) {
  const int64_t sections = theta.numel();
  const Tensor keep = checked("theta", theta, theta, ScalarType::Float, {sections});
  const Tensor rate = checked("probe_rate", probe_rate, theta, ScalarType::Float, {sections});
  const Tensor state = checked("rng_state", rng_state, theta, ScalarType::Long, {3});
  check_probabilities("theta", keep);
  check_probabilities("probe_rate", rate);
  check_first_row(state, batch);
  check(batch >= 0 && batch < kMostRows && row_multiple >= 1, "a batch of ", batch,
        " rows in multiples of ", row_multiple, " cannot be drawn");
  check(scheme == "systematic" || scheme == "independent", "unknown scheme ", scheme);

  const Tensor gates = torch::stable::new_empty(keep, {sections, batch});
  const Tensor slots = torch::stable::new_empty(keep, {sections, batch}, ScalarType::Int);
  const Tensor rows = torch::stable::new_empty(keep, {sections, batch}, ScalarType::Long);
  const Tensor probes = torch::stable::new_empty(keep, {sections, batch}, ScalarType::Long);
  const Tensor counts = torch::stable::new_empty(keep, {sections, 2}, ScalarType::Long);

  DrawParams p{};
  p.rng_state = read<int64_t>(state);
  p.sections = sections;
  p.batch = batch;
  p.theta = read<float>(keep);
  p.probe_rate = read<float>(rate);
  p.min_rows = min_rows;
  p.row_multiple = row_multiple;
  p.systematic = scheme == "systematic";
  p.gates = write<float>(gates);
  p.slots = write<int32_t>(slots);
  p.rows = write<int64_t>(rows);
  p.probes = write<int64_t>(probes);
  p.counts = write<int64_t>(counts);
  run(p, theta.get_device_index());
  return {gates, slots, rows, probes, counts};
}

void projected_gate_step_(Tensor theta, Tensor statistics, Tensor in_play, const Tensor& slope,
                          const Tensor& counted, const Tensor& penalty, const Tensor& free,
                          double horizon, double noise_factor, double decay, double confidence,
                          int64_t max_descending) {
  const int64_t sections = theta.numel();
  check(slope.dim() == 2, "slope must have two dimensions, got ", described(slope));
  const int64_t rows = slope.size(1);
  Updated moved_theta("theta", theta, theta, ScalarType::Float, {sections});
  Updated sums("statistics", statistics, theta, ScalarType::Float, {5, sections});
  Updated playing("in_play", in_play, theta, ScalarType::Bool, {sections});
  const Tensor slopes = checked("slope", slope, theta, ScalarType::Float, {sections, rows});
  const Tensor evidence = checked("counted", counted, theta, ScalarType::Bool, {sections, rows});
  const Tensor penalties = checked("penalty", penalty, theta, ScalarType::Float, {sections});
  const Tensor movable = checked("free", free, theta, ScalarType::Bool, {sections});
  const Place arguments[] = {{"theta", theta}, {"statistics", statistics}, {"in_play", in_play},
                             {"slope", slope}, {"counted", counted},       {"penalty", penalty},
                             {"free", free}};
  for (int written = 0; written < 3; ++written) {
    for (int other = written + 1; other < 7; ++other) {
      check_apart(arguments[written], arguments[other]);
    }
  }
  check_positive("penalty", penalties);

  StepParams p{};
  p.sections = sections;
  p.rows = rows;
  p.slope = read<float>(slopes);
  p.counted = read<bool>(evidence);
  p.penalty = read<float>(penalties);
  p.free = read<bool>(movable);
  p.options = {static_cast<float>(horizon), static_cast<float>(noise_factor),
               static_cast<float>(decay), static_cast<float>(confidence)};
  p.max_descending = max_descending;
  p.theta = moved_theta.data<float>();
  p.statistics = sums.data<float>();
  p.in_play = playing.data<bool>();

  std::optional<Tensor> scratch;
  if (const int64_t room = step_scratch(sections); room > 0) {
    scratch = torch::stable::new_empty(slopes, {room});
  }
  run(p, scratch ? write<float>(*scratch) : nullptr, theta.get_device_index());
  moved_theta.finish();
  sums.finish();
  playing.finish();
}

}  // namespace layerprune
