// The kernels of `CpuKernels`, in terms of lanes. Included inside a namespace of each instruction
// set, after the system's headers and parameters.h; nothing here may be a function that the linker
// merges with another's copy.

#include "lanes.h"

// In front of a loop none of whose rounds writes what another reads.
#if defined(__GNUC__) && !defined(__clang__)
#define LAYERPRUNE_INDEPENDENT _Pragma("GCC ivdep")
#else
#define LAYERPRUNE_INDEPENDENT
#endif

// Calls `work(row, offset, count)` for the segments begin, ..., end - 1 of rows of `size` elements.
template <typename Work>
static inline void for_segments(int64_t size, int64_t begin, int64_t end, Work work) {
  const int64_t per_row = segments(size);
  int64_t row = begin / per_row, segment = begin % per_row;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t offset = segment * kSegment;
    work(row, offset, size - offset < kSegment ? size - offset : kSegment);
    if (++segment == per_row) {
      segment = 0;
      ++row;
    }
  }
}

template <typename T>
static inline const T* at(RowsIn rows, int64_t row, int64_t offset) {
  return static_cast<const T*>(rows.data) + row * rows.stride + offset;
}
template <typename T>
static inline T* at(RowsOut rows, int64_t row, int64_t offset) {
  return static_cast<T*>(rows.data) + row * rows.stride + offset;
}

// out = f(in...), element by element; f takes and gives lanes.
template <bool stream, typename T, typename F, typename... In>
static inline void transform(int64_t count, T* out, F f, const In*... in) {
  constexpr int64_t step = decltype(load(out))::count;
  int64_t i = 0;
  for (; i + step <= count; i += step) store<stream>(out + i, f(load(in + i)...));
  if (i < count) store_part(out + i, f(load_part(in + i, count - i)...), count - i);
}

// `bytes` is a multiple of 4 where it streams.
static inline void copy_bytes(bool stream, void* out, const void* in, int64_t bytes) {
  if (stream) {
    transform<true>(
        bytes / 4, static_cast<float*>(out), [](FloatLanes a) { return a; },
        static_cast<const float*>(in));
  } else {
    std::memcpy(out, in, bytes);
  }
}

template <typename T, SumForm form, bool stream>
static void forward(const ForwardParams& p, int64_t begin, int64_t end) {
  using A = typename Accumulation<T>::type;
  using Lanes = decltype(load(static_cast<const T*>(nullptr)));
  for_segments(p.size, begin, end, [&](int64_t row, int64_t offset, int64_t count) {
    const T* x = at<T>(p.x, row, offset);
    T* y = at<T>(p.y, row, offset);
    const int64_t slot = p.slot == nullptr ? row : p.slot[row];
    const A gate = p.gate[row];
    if (slot < 0 || gate == 0) {
      if constexpr (form == SumForm::kAddRelu) {
        transform<stream>(count, y, [](Lanes a) { return relu(a); }, x);
      } else {
        copy_bytes(stream, y, x, count * sizeof(T));
      }
      return;
    }
    const T* branch = at<T>(p.branch, slot, offset);
    const Lanes weight = all(gate), rest = all(A{1} - gate);
    if constexpr (form == SumForm::kLerp) {
      // From the nearer end, as torch.lerp: exact at both.
      if (gate == 1) {
        copy_bytes(stream, y, branch, count * sizeof(T));
      } else if (gate < A{0.5} && gate > A{-0.5}) {
        transform<stream>(
            count, y, [=](Lanes a, Lanes b) { return multiply_add(weight, b - a, a); }, x, branch);
      } else {
        transform<stream>(
            count, y, [=](Lanes a, Lanes b) { return b - (b - a) * rest; }, x, branch);
      }
    } else {
      transform<stream>(
          count, y,
          [=](Lanes a, Lanes b) {
            const Lanes both = multiply_add(weight, b, a);
            return form == SumForm::kAddRelu ? relu(both) : both;
          },
          x, branch);
    }
  });
  if (stream) finish_streaming();
}

// One segment of the backward: writes d_x and, unless null, d_branch. Returns the sum of the sum's
// gradient times `factor`, 0 where that is null.
template <typename T, SumForm form, bool stream, bool to_branch, bool to_gate>
static double backward_segment(
    int64_t count, const T* grad, const T* y,
    const typename std::conditional<form == SumForm::kLerp, typename Accumulation<T>::type,
                                    T>::type* factor,
    typename Accumulation<T>::type gate, T* d_x, T* d_branch) {
  using A = typename Accumulation<T>::type;
  using Lanes = decltype(load(static_cast<const T*>(nullptr)));
  constexpr int64_t step = Lanes::count;
  constexpr int chains = 4;  // independent sums, so that one need not wait for the other
  const Lanes weight = all(gate), rest = all(A{1} - gate);
  Lanes sums[chains] = {all(A{0}), all(A{0}), all(A{0}), all(A{0})};

  const auto passed = [](Lanes g, Lanes out) {
    return form == SumForm::kAddRelu ? zero_unless_positive(g, out) : g;
  };
  const auto to_x = [=](Lanes p) { return form == SumForm::kLerp && to_branch ? p * rest : p; };
  const auto whole = [&](int64_t i, Lanes& partial) {
    const Lanes g = load(grad + i);
    const Lanes p = passed(g, form == SumForm::kAddRelu ? load(y + i) : g);
    store<stream>(d_x + i, to_x(p));
    if (to_branch) store<stream>(d_branch + i, p * weight);
    if (to_gate) partial = multiply_add(p, load(factor + i), partial);
  };
  int64_t i = 0;
  for (; i + chains * step <= count; i += chains * step) {
    for (int chain = 0; chain < chains; ++chain) whole(i + chain * step, sums[chain]);
  }
  for (; i + step <= count; i += step) whole(i, sums[0]);
  if (i < count) {
    const int64_t left = count - i;
    const Lanes g = load_part(grad + i, left);
    const Lanes p = passed(g, form == SumForm::kAddRelu ? load_part(y + i, left) : g);
    store_part(d_x + i, to_x(p), left);
    if (to_branch) store_part(d_branch + i, p * weight, left);
    if (to_gate) sums[1] = multiply_add(p, load_part(factor + i, left), sums[1]);
  }
  return to_gate ? sum((sums[0] + sums[1]) + (sums[2] + sums[3])) : 0.0;
}

template <typename T, SumForm form, bool stream>
static void backward(const BackwardParams& p, int64_t begin, int64_t end) {
  using A = typename Accumulation<T>::type;
  using Factor = typename std::conditional<form == SumForm::kLerp, A, T>::type;
  const int64_t per_row = segments(p.size);
  for_segments(p.size, begin, end, [&](int64_t row, int64_t offset, int64_t count) {
    const T* grad = at<T>(p.grad, row, offset);
    const T* y = form == SumForm::kAddRelu ? at<T>(p.y, row, offset) : nullptr;
    T* d_x = at<T>(p.d_x, row, offset);
    const int64_t slot = p.slot == nullptr ? row : p.slot[row];
    const A gate = p.gate[row];
    T* d_branch = slot < 0 ? nullptr : at<T>(p.d_branch, slot, offset);
    const int64_t factor_row = p.factor.data == nullptr  ? -1
                               : p.factor_row == nullptr ? row
                                                         : p.factor_row[row];
    const Factor* factor = factor_row < 0 ? nullptr : at<Factor>(p.factor, factor_row, offset);

    double gate_sum = 0.0;
    if (slot >= 0 && gate != 0) {
      const auto work = factor == nullptr ? backward_segment<T, form, stream, true, false>
                                          : backward_segment<T, form, stream, true, true>;
      gate_sum = work(count, grad, y, factor, gate, d_x, d_branch);
    } else {
      const auto work = factor == nullptr ? backward_segment<T, form, stream, false, false>
                                          : backward_segment<T, form, stream, false, true>;
      gate_sum = work(count, grad, y, factor, gate, d_x, nullptr);
      if (d_branch != nullptr) std::memset(d_branch, 0, count * sizeof(T));
    }
    if (p.gate_sums != nullptr) p.gate_sums[row * per_row + offset / kSegment] = gate_sum;
  });
  if (stream) finish_streaming();
}

static void gather(const GatherParams& p, int64_t begin, int64_t end) {
  for_segments(p.size, begin, end, [&](int64_t row, int64_t offset, int64_t count) {
    const int64_t width = p.element_bytes;
    char* out = static_cast<char*>(p.out.data) + (row * p.out.stride + offset) * width;
    if (p.row[row] < 0) {
      std::memset(out, 0, count * width);
      return;
    }
    const char* in =
        static_cast<const char*>(p.source.data) + (p.row[row] * p.source.stride + offset) * width;
    copy_bytes(p.stream, out, in, count * width);
  });
  if (p.stream) finish_streaming();
}

template <typename T>
static void scatter_add(const ScatterAddParams& p, int64_t begin, int64_t end) {
  using Lanes = decltype(load(static_cast<const T*>(nullptr)));
  for_segments(p.size, begin, end, [&](int64_t row, int64_t offset, int64_t count) {
    T* out = at<T>(p.out, p.row[row], offset);
    transform<false>(
        count, out, [](Lanes a, Lanes b) { return a + b; }, static_cast<const T*>(out),
        at<T>(p.source, row, offset));
  });
}

template <typename T>
static void difference(const DifferenceParams& p, int64_t begin, int64_t end) {
  using A = typename Accumulation<T>::type;
  using Lanes = decltype(load(static_cast<const T*>(nullptr)));
  for_segments(p.size, begin, end, [&](int64_t row, int64_t offset, int64_t count) {
    A* out = at<A>(p.out, row, offset);
    if (p.x_row[row] < 0) {
      std::memset(out, 0, count * sizeof(A));
      return;
    }
    transform<false>(
        count, out, [](Lanes a, Lanes b) { return a - b; },
        at<T>(p.branch, p.branch_row[row], offset), at<T>(p.x, p.x_row[row], offset));
  });
}

// ---- Choice of the template's instance ----

template <template <typename> class Call, typename Params>
static void by_type(const Params& p, int64_t begin, int64_t end) {
  switch (p.type) {
    case ElementType::kFloat64:
      return Call<double>::run(p, begin, end);
    case ElementType::kFloat32:
      return Call<float>::run(p, begin, end);
    case ElementType::kFloat16:
      return Call<Half>::run(p, begin, end);
    case ElementType::kBFloat16:
      return Call<BFloat16>::run(p, begin, end);
  }
}

template <typename T>
struct Forward {
  static void run(const ForwardParams& p, int64_t begin, int64_t end) {
    using Kernel = void (*)(const ForwardParams&, int64_t, int64_t);
    static constexpr Kernel kernels[3][2] = {
        {forward<T, SumForm::kAdd, false>, forward<T, SumForm::kAdd, kStreams>},
        {forward<T, SumForm::kAddRelu, false>, forward<T, SumForm::kAddRelu, kStreams>},
        {forward<T, SumForm::kLerp, false>, forward<T, SumForm::kLerp, kStreams>},
    };
    kernels[static_cast<int>(p.form)][p.stream](p, begin, end);
  }
};

template <typename T>
struct Backward {
  static void run(const BackwardParams& p, int64_t begin, int64_t end) {
    using Kernel = void (*)(const BackwardParams&, int64_t, int64_t);
    static constexpr Kernel kernels[3][2] = {
        {backward<T, SumForm::kAdd, false>, backward<T, SumForm::kAdd, kStreams>},
        {backward<T, SumForm::kAddRelu, false>, backward<T, SumForm::kAddRelu, kStreams>},
        {backward<T, SumForm::kLerp, false>, backward<T, SumForm::kLerp, kStreams>},
    };
    kernels[static_cast<int>(p.form)][p.stream](p, begin, end);
  }
};

template <typename T>
struct ScatterAdd {
  static void run(const ScatterAddParams& p, int64_t begin, int64_t end) {
    scatter_add<T>(p, begin, end);
  }
};

template <typename T>
struct Difference {
  static void run(const DifferenceParams& p, int64_t begin, int64_t end) {
    difference<T>(p, begin, end);
  }
};

// ---- The draw and the step ----

static void fill_row_words(Stream stream, uint32_t section, uint32_t first_row, int64_t count,
                           uint32_t* const words[4]) {
  int64_t i = 0;
  for (; i + WordLanes::count <= count; i += WordLanes::count) {
    const auto found =
        row_words(stream, section, WordLanes::from(first_row + static_cast<uint32_t>(i)));
    for (int w = 0; w < 4; ++w) store(words[w] + i, found.word[w]);
  }
  for (; i < count; ++i) {
    const Words found = row_words(stream, section, first_row + static_cast<uint32_t>(i));
    for (int w = 0; w < 4; ++w) words[w][i] = found.word[w];
  }
}

static inline int64_t count_at_most(const uint32_t* words, int64_t count, uint32_t bound) {
  uint32_t found = 0;
  for (int64_t i = 0; i < count; ++i) found += words[i] <= bound;
  return found;
}

// By interpolation, as one opens a dictionary: no branch depends on a single word, where a
// processor would guess wrong every other time.
static void mark_least(const uint32_t* words, const uint8_t* excluded, int64_t count,
                       int64_t eligible, int64_t least, uint8_t* taken) {
  if (least <= 0) {
    for (int64_t i = 0; i < count; ++i) taken[i] = 0;
    return;
  }
  // Always: at most `low` are fewer than `least` words, at most `high` are `least` or more.
  int64_t low = -1, high = 0xFFFFFFFF, at_low = 0, at_high = eligible;
  for (int guess = 0; at_high != least && high - low > 1; ++guess) {
    const bool halve = guess >= 16;  // should they not be spread evenly after all
    const double share =
        halve ? 0.5
              : (static_cast<double>(least - at_low) - 0.5) / static_cast<double>(at_high - at_low);
    int64_t middle = low + static_cast<int64_t>(share * static_cast<double>(high - low));
    middle = middle <= low ? low + 1 : middle >= high ? high - 1 : middle;
    const int64_t at_middle = count_at_most(words, count, static_cast<uint32_t>(middle));
    if (at_middle < least) {
      low = middle;
      at_low = at_middle;
    } else {
      high = middle;
      at_high = at_middle;
    }
  }
  const uint32_t bound = static_cast<uint32_t>(high);
  for (int64_t i = 0; i < count; ++i) {
    taken[i] = static_cast<uint8_t>(words[i] <= bound) & (excluded[i] ^ 1u);
  }
  for (int64_t i = count; at_high > least; --at_high) {  // equal words, one in billions
    do --i;
    while (words[i] != bound || excluded[i]);
    taken[i] = 0;
  }
}

static void counted_sum(const float* slope, const bool* counted, int64_t count, float* sum_out,
                        float* number) {
  constexpr int64_t step = FloatLanes::count;
  const FloatLanes one = all(1.0f);
  FloatLanes sums[2] = {all(0.0f), all(0.0f)}, numbers[2] = {all(0.0f), all(0.0f)};
  int64_t i = 0;
  for (; i + 2 * step <= count; i += 2 * step) {
    for (int chain = 0; chain < 2; ++chain) {
      const bool* mask = counted + i + chain * step;
      sums[chain] = sums[chain] + select(mask, load(slope + i + chain * step));
      numbers[chain] = numbers[chain] + select(mask, one);
    }
  }
  float total = sum(sums[0] + sums[1]), found = sum(numbers[0] + numbers[1]);
  for (; i < count; ++i) {
    total += counted[i] ? slope[i] : 0.0f;
    found += counted[i] ? 1.0f : 0.0f;
  }
  *sum_out = total;
  *number = found;
}

static inline Statistics read(const StepParams& p, int64_t section) {
  const float* s = p.statistics + section;
  const int64_t n = p.sections;
  return {s[0], s[n], s[2 * n], s[3 * n], s[4 * n]};
}

static void step(const StepParams& p, float* moved, int64_t begin, int64_t end) {
  constexpr int64_t block = 256;
  float sum[block], rows[block];
  for (int64_t first = begin; first < end; first += block) {
    const int64_t count = end - first < block ? end - first : block;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t offset = (first + i) * p.rows;
      counted_sum(p.slope + offset, p.counted + offset, p.rows, sum + i, rows + i);
    }
    // One section in a lane: a section without evidence is worked on like the others and then left
    // as it was.
    float* const s = p.statistics;
    const int64_t n = p.sections;
    LAYERPRUNE_INDEPENDENT
    for (int64_t i = 0; i < count; ++i) {
      const int64_t section = first + i;
      const bool seen = rows[i] > 0.0f;
      const float divisor = seen ? rows[i] : 1.0f;
      const float estimate = sum[i] / divisor;
      const Statistics old = read(p, section);
      const Statistics now = with_evidence(old, estimate, divisor, p.options.decay);
      const float to = projected_theta(p.theta[section], estimate, p.penalty[section],
                                       row_variance(now) / divisor, p.options);
      moved[section] = seen ? to : p.theta[section];
      s[section] = seen ? now.steps : old.steps;
      s[n + section] = seen ? now.rows : old.rows;
      s[2 * n + section] = seen ? now.squares : old.squares;
      s[3 * n + section] = seen ? now.mean : old.mean;
      s[4 * n + section] = seen ? now.deviations : old.deviations;
    }
  }
}

static void standing(const StepParams& p, float* excesses, float* bounds) {
  LAYERPRUNE_INDEPENDENT
  for (int64_t section = 0; section < p.sections; ++section) {
    const Statistics s = read(p, section);
    excesses[section] = excess(s, p.penalty[section]);
    bounds[section] = excess_bound(s, p.penalty[section], p.options.confidence);
  }
}

// Evaluated by the compiler: no instruction of the set runs before it is chosen.
static constexpr CpuKernels kernels() {
  return {by_type<Forward, ForwardParams>,
          by_type<Backward, BackwardParams>,
          gather,
          by_type<ScatterAdd, ScatterAddParams>,
          by_type<Difference, DifferenceParams>,
          fill_row_words,
          mark_least,
          step,
          standing};
}
