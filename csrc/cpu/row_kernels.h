// The kernels on rows, in terms of lanes. See kernels.h.

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
template <bool non_temporal, typename T, typename F, typename... In>
static inline void transform(int64_t count, T* out, F f, const In*... in) {
  constexpr int64_t step = decltype(load(out))::count;
  int64_t i = 0;
  for (; i + step <= count; i += step) store<non_temporal>(out + i, f(load(in + i)...));
  if (i < count) store_part(out + i, f(load_part(in + i, count - i)...), count - i);
}

template <typename T, SumForm form, bool non_temporal>
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
        transform<non_temporal>(count, y, [](Lanes a) { return relu(a); }, x);
      } else {
        copy_bytes<non_temporal>(y, x, count * sizeof(T));
      }
      return;
    }
    const T* branch = at<T>(p.branch, slot, offset);
    const Lanes weight = all(gate), rest = all(A{1} - gate);
    if constexpr (form == SumForm::kLerp) {
      // From the nearer end, as torch.lerp: exact at both.
      if (gate == 1) {
        copy_bytes<non_temporal>(y, branch, count * sizeof(T));
      } else if (gate < A{0.5} && gate > A{-0.5}) {
        transform<non_temporal>(
            count, y, [=](Lanes a, Lanes b) { return multiply_add(weight, b - a, a); }, x, branch);
      } else {
        transform<non_temporal>(
            count, y, [=](Lanes a, Lanes b) { return b - (b - a) * rest; }, x, branch);
      }
    } else {
      transform<non_temporal>(
          count, y,
          [=](Lanes a, Lanes b) {
            const Lanes both = multiply_add(weight, b, a);
            return form == SumForm::kAddRelu ? relu(both) : both;
          },
          x, branch);
    }
  });
  if (non_temporal) finish_non_temporal();
}

// One segment of the backward: writes d_x and d_branch, unless null. Returns the sum of the sum's
// gradient times `factor`, 0 where that is null.
template <typename T, SumForm form, bool non_temporal, bool to_branch, bool to_gate>
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
    if (d_x != nullptr) store<non_temporal>(d_x + i, to_x(p));
    if (to_branch) store<non_temporal>(d_branch + i, p * weight);
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
    if (d_x != nullptr) store_part(d_x + i, to_x(p), left);
    if (to_branch) store_part(d_branch + i, p * weight, left);
    if (to_gate) sums[1] = multiply_add(p, load_part(factor + i, left), sums[1]);
  }
  return to_gate ? sum((sums[0] + sums[1]) + (sums[2] + sums[3])) : 0.0;
}

template <typename T, SumForm form, bool non_temporal>
static void backward(const BackwardParams& p, int64_t begin, int64_t end) {
  using A = typename Accumulation<T>::type;
  using Factor = typename std::conditional<form == SumForm::kLerp, A, T>::type;
  const int64_t per_row = segments(p.size);
  for_segments(p.size, begin, end, [&](int64_t row, int64_t offset, int64_t count) {
    const T* grad = at<T>(p.grad, row, offset);
    const T* y = form == SumForm::kAddRelu ? at<T>(p.y, row, offset) : nullptr;
    T* d_x = p.d_x.data == nullptr ? nullptr : at<T>(p.d_x, row, offset);
    const int64_t slot = p.slot == nullptr ? row : p.slot[row];
    const A gate = p.gate[row];
    T* d_branch = slot < 0 ? nullptr : at<T>(p.d_branch, slot, offset);
    const int64_t factor_row = p.factor.data == nullptr              ? -1
                               : p.factor_row == nullptr || slot < 0 ? slot
                                                                     : p.factor_row[row];
    const Factor* factor = factor_row < 0 ? nullptr : at<Factor>(p.factor, factor_row, offset);

    double gate_sum = 0.0;
    if (slot >= 0 && gate != 0) {
      const auto work = factor == nullptr ? backward_segment<T, form, non_temporal, true, false>
                                          : backward_segment<T, form, non_temporal, true, true>;
      gate_sum = work(count, grad, y, factor, gate, d_x, d_branch);
    } else {
      const auto work = factor == nullptr ? backward_segment<T, form, non_temporal, false, false>
                                          : backward_segment<T, form, non_temporal, false, true>;
      gate_sum = work(count, grad, y, factor, gate, d_x, nullptr);
      if (d_branch != nullptr) std::memset(d_branch, 0, count * sizeof(T));
    }
    if (p.gate_sums != nullptr) p.gate_sums[row * per_row + offset / kSegment] = gate_sum;
  });
  if (non_temporal) finish_non_temporal();
}

template <bool non_temporal>
static void gather_rows(const GatherParams& p, int64_t begin, int64_t end) {
  for_segments(p.size, begin, end, [&](int64_t row, int64_t offset, int64_t count) {
    const int64_t width = p.element_bytes;
    char* out = static_cast<char*>(p.out.data) + (row * p.out.stride + offset) * width;
    if (p.row[row] < 0) {
      std::memset(out, 0, count * width);
      return;
    }
    const char* in =
        static_cast<const char*>(p.source.data) + (p.row[row] * p.source.stride + offset) * width;
    copy_bytes<non_temporal>(out, in, count * width);
  });
  if (non_temporal) finish_non_temporal();
}

static void gather(const GatherParams& p, int64_t begin, int64_t end) {
  (p.non_temporal ? gather_rows<kNonTemporal> : gather_rows<false>)(p, begin, end);
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
        {forward<T, SumForm::kAdd, false>, forward<T, SumForm::kAdd, kNonTemporal>},
        {forward<T, SumForm::kAddRelu, false>, forward<T, SumForm::kAddRelu, kNonTemporal>},
        {forward<T, SumForm::kLerp, false>, forward<T, SumForm::kLerp, kNonTemporal>},
    };
    kernels[static_cast<int>(p.form)][p.non_temporal](p, begin, end);
  }
};

template <typename T>
struct Backward {
  static void run(const BackwardParams& p, int64_t begin, int64_t end) {
    using Kernel = void (*)(const BackwardParams&, int64_t, int64_t);
    static constexpr Kernel kernels[3][2] = {
        {backward<T, SumForm::kAdd, false>, backward<T, SumForm::kAdd, kNonTemporal>},
        {backward<T, SumForm::kAddRelu, false>, backward<T, SumForm::kAddRelu, kNonTemporal>},
        {backward<T, SumForm::kLerp, false>, backward<T, SumForm::kLerp, kNonTemporal>},
    };
    kernels[static_cast<int>(p.form)][p.non_temporal](p, begin, end);
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
