// The operators for tensors on the CPU: checks of values, and the kernels over all cores.
#include <algorithm>
#include <cstring>
#include <vector>

#include "../cpu/table.h"
#include "device.h"
#include "operators.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace layerprune {
namespace {

// Fails unless each of the numbers, but for -1 where `absent` is allowed, is one of `size`, and
// none stands twice.
template <typename Index, typename Range, typename Twice>
void check_distinct(const Tensor& index, int64_t size, bool absent, Range out_of_range,
                    Twice twice) {
  const Index* numbers = read<Index>(index);
  const int64_t count = index.numel();
  std::vector<int64_t> place(size, -1);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t number = numbers[i];
    if (absent && number == -1) continue;
    if (number < 0 || number >= size) out_of_range(i, number);
    if (place[number] >= 0) twice(number, place[number], i);
    place[number] = i;
  }
}

// Whether stores go past the caches: where an operation moves more than they hold and every row of
// its results starts on a boundary that such stores need.
bool non_temporal(int64_t bytes_moved, int64_t row_bytes, std::initializer_list<RowsOut> results) {
  // What a core finds of a usual last-level cache. The size that a system reports is of no use: on
  // a virtual machine it is often that of the whole host.
  constexpr int64_t cache = int64_t{32} << 20;
  if (bytes_moved < cache) return false;
  constexpr int64_t boundary = 32;
  if (row_bytes % boundary != 0) return false;
  for (const RowsOut& result : results) {
    if (reinterpret_cast<uintptr_t>(result.data) % boundary != 0) return false;
  }
  return true;
}

int64_t element_bytes(ElementType type) {
  return type == ElementType::kFloat64 ? 8 : type == ElementType::kFloat32 ? 4 : 2;
}

// Runs `kernel` over all segments of `rows` rows in parallel.
template <typename Params>
void run_kernel(void (*kernel)(const Params&, int64_t, int64_t), const Params& params) {
  constexpr int64_t grain = 32768;  // elements worth a thread
  if (params.rows == 0 || params.size == 0) return;
  const int64_t per_unit = std::min(params.size, kSegment);
  torch::stable::parallel_for(0, params.rows * segments(params.size),
                              (grain + per_unit - 1) / per_unit,
                              [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

// Draws all gates ahead: the kernels take rows by segments, and words are cheapest in a row.
void draw(const SampledGates& sampled, int64_t rows, float* gates) {
  std::vector<uint32_t> words(4 * rows);
  uint32_t* const each[4] = {words.data(), words.data() + rows, words.data() + 2 * rows,
                             words.data() + 3 * rows};
  cpu_kernels().row_words(stream_of(sampled.rng_state), sampled.section,
                          first_row_of(sampled.rng_state), rows, each);
  for (int64_t row = 0; row < rows; ++row) {
    gates[row] = independent_gate(*sampled.theta, each[3][row]);
  }
}

}  // namespace

// Fresh memory costs a page fault for every page, often more than the operation itself: asks for
// large pages, as NumPy does for its arrays. Without effect where the system has set them
// otherwise.
void prepare(const Tensor& fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const int64_t bytes = fresh.numel() * static_cast<int64_t>(fresh.element_size());
  if (bytes < (int64_t{4} << 20)) return;
  constexpr uintptr_t page = 4096;
  const auto begin = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
  const uintptr_t first = (begin + page - 1) / page * page;
  madvise(reinterpret_cast<void*>(first), (begin + bytes - first) / page * page, MADV_HUGEPAGE);
#endif
}

void check_probabilities(const char* name, const Tensor& values) {
  const float* value = read<float>(values);
  for (int64_t i = 0; i < values.numel(); ++i) {
    check(value[i] >= 0.0f && value[i] <= 1.0f, name, "[", i, "] is ", value[i], ", not in [0, 1]");
  }
}

void check_positive(const char* name, const Tensor& values) {
  const float* value = read<float>(values);
  const int64_t count = values.numel();
  int wrong = 0;  // counted without a branch: that loop becomes vectors
  for (int64_t i = 0; i < count; ++i) wrong += !(value[i] > 0.0f);
  for (int64_t i = 0; wrong > 0 && i < count; ++i) {
    check(value[i] > 0.0f, name, "[", i, "] is ", value[i], ", not positive");
  }
}

void check_first_row(const Tensor& rng_state, int64_t batch) {
  const int64_t first = read<int64_t>(rng_state)[2];
  check(first >= 0 && first <= int64_t{kReservedRow} - batch,
        "rng_state[2], the batch's first global row, is ", first,
        "; the batch's rows must lie in [0, ", kReservedRow, ")");
}

void check_distinct_rows(const char* name, const Tensor& rows, int64_t size) {
  check_distinct<int64_t>(
      rows, size, false,
      [&](int64_t i, int64_t row) {
        check(false, name, "[", i, "] is ", row, ", but there are ", size, " rows");
      },
      [&](int64_t row, int64_t, int64_t) { check(false, name, " has row ", row, " twice"); });
}

void check_distinct_slots(const Tensor& slot, int64_t branch_rows) {
  check_distinct<int32_t>(
      slot, branch_rows, true,
      [&](int64_t row, int64_t place) {
        check(false, "slot[", row, "] is ", place, ", neither -1 nor one of the branch's ",
              branch_rows, " rows");
      },
      [&](int64_t place, int64_t first, int64_t second) {
        check(false, "slot has ", place, " twice, for rows ", first, " and ", second);
      });
}

void run(ForwardParams p, int32_t) {
  if (p.sampled.rng_state != nullptr) {
    draw(p.sampled, p.rows, p.sampled.gates);
    p.gate = p.sampled.gates;
  }
  const int64_t row_bytes = p.size * element_bytes(p.type);
  p.non_temporal = non_temporal((2 * p.rows + p.branch.rows) * row_bytes, row_bytes, {p.y});
  run_kernel(cpu_kernels().forward, p);
}

void run(BackwardParams p, int32_t) {
  std::vector<float> gates;
  if (p.sampled.rng_state != nullptr) {
    gates.resize(p.rows);
    draw(p.sampled, p.rows, gates.data());
    p.gate = gates.data();
  }
  const int64_t row_bytes = p.size * element_bytes(p.type);
  const int64_t rows_moved = 2 * p.rows + p.d_branch.rows;
  p.non_temporal = non_temporal(rows_moved * row_bytes, row_bytes, {p.d_x, p.d_branch});
  run_kernel(cpu_kernels().backward, p);
}

void run(const GateSumParams& p, int32_t) {
  for (int64_t row = 0; row < p.rows; ++row) {
    double sum = 0.0;
    for (int64_t part = 0; part < p.parts; ++part) sum += p.gate_sums[row * p.parts + part];
    p.d_gate[row] = static_cast<float>(sum);
  }
}

void run(const ClearParams& p, int32_t) {
  char* rows = static_cast<char*>(p.out.data);
  for (int64_t row = 0; row < p.out.rows && p.row_bytes > 0; ++row) {
    if (p.owner[row] < 0) std::memset(rows + row * p.row_bytes, 0, p.row_bytes);
  }
}

void run(GatherParams p, int32_t) {
  const int64_t row_bytes = p.size * p.element_bytes;
  p.non_temporal = non_temporal(2 * p.rows * row_bytes, row_bytes, {p.out});
  run_kernel(cpu_kernels().gather, p);
}

void run(const ScatterAddParams& p, int32_t) { run_kernel(cpu_kernels().scatter_add, p); }

void run(const DifferenceParams& p, int32_t) { run_kernel(cpu_kernels().difference, p); }

void run(const InverseParams& p, int32_t) {
  std::fill_n(p.inverse, p.size, int64_t{-1});
  for (int64_t i = 0; i < p.count; ++i) {
    const int64_t index = p.narrow != nullptr ? p.narrow[i] : p.wide[i];
    if (index >= 0) p.inverse[index] = i;
  }
}

void run(const FactorRowsParams& p, int32_t) {
  for (int64_t i = 0; i < p.count; ++i) choose_factor_row(p, i);
}

void run(const DrawParams& p, int32_t) {
  const int64_t grain = 1 + 4096 / (p.batch + 1);  // sections worth a thread
  torch::stable::parallel_for(0, p.sections, grain,
                              [&](int64_t begin, int64_t end) { draw_sections(p, begin, end); });
}

void run(const StepParams& p, float*, int32_t) {
  std::vector<float> moved(p.sections);             // cheaper than a tensor
  const int64_t grain = 1 + 32768 / (p.rows + 32);  // sections worth a thread
  torch::stable::parallel_for(0, p.sections, grain, [&](int64_t begin, int64_t end) {
    cpu_kernels().step(p, moved.data(), begin, end);
  });
  compete(p, moved.data());
}

int64_t step_scratch(int64_t) { return 0; }

STABLE_TORCH_LIBRARY_IMPL(layerprune, CPU, m) { register_operators(m); }

}  // namespace layerprune
