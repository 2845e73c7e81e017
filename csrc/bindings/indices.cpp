#include "indices.h"

#include "../gate_math.h"

namespace layerprune {

void check_probabilities(const char* name, const float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    check(values[i] >= 0.0f && values[i] <= 1.0f, name, "[", i, "] is ", values[i],
          ", not in [0, 1]");
  }
}

void check_first_row(int64_t first_row, int64_t batch) {
  check(first_row >= 0 && first_row <= int64_t{kReservedRow} - batch, "rng_state[2], the batch's ",
        "first global row, is ", first_row, "; the batch's rows must lie in [0, ", kReservedRow,
        ")");
}

void check_rows_like(const char* name, const Tensor& rows, const Tensor& like) {
  check(rows.scalar_type() == like.scalar_type() && rows.dim() == like.dim(), name, " (",
        described(rows), ") must have the dtype and the dimensions of ", described(like));
  for (int64_t d = 1; d < like.dim(); ++d) {
    check(rows.size(d) == like.size(d), name, " (", described(rows),
          ") does not have rows like those of ", described(like));
  }
}

void check_distinct_rows(const char* name, const int64_t* rows, int64_t count, int64_t batch) {
  std::vector<bool> seen(batch);
  for (int64_t i = 0; i < count; ++i) {
    check(rows[i] >= 0 && rows[i] < batch, name, "[", i, "] is ", rows[i], ", but there are ",
          batch, " rows");
    check(!seen[rows[i]], name, " has row ", rows[i], " twice");
    seen[rows[i]] = true;
  }
}

std::vector<int64_t> owners(const int32_t* slot, int64_t batch, int64_t branch_rows) {
  check(slot != nullptr || branch_rows == batch, "without slot the branch must have ", batch,
        " rows, not ", branch_rows);
  std::vector<int64_t> owner(branch_rows, -1);
  for (int64_t row = 0; row < batch; ++row) {
    const int64_t place = slot == nullptr ? row : slot[row];
    check(place >= -1 && place < branch_rows, "slot[", row, "] is ", place,
          ", neither -1 nor one of the branch's ", branch_rows, " rows");
    if (place < 0) continue;
    check(owner[place] < 0, "slot has ", place, " twice, for rows ", owner[place], " and ", row);
    owner[place] = row;
  }
  return owner;
}

}  // namespace layerprune
