// The kernels on words and on sections, in terms of lanes. See kernels.h.

// In front of a loop none of whose rounds writes what another reads.
#if defined(__GNUC__) && !defined(__clang__)
#define LAYERPRUNE_INDEPENDENT _Pragma("GCC ivdep")
#else
#define LAYERPRUNE_INDEPENDENT
#endif

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
