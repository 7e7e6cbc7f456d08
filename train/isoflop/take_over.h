// A published table as the beginning of a sweep: its finished cells need not be trained again.
#pragma once

#include <cstdint>
#include <span>

#include "train/isoflop/row.h"
#include "train/isoflop/sweep_folder.h"

namespace fathom::isoflop {

struct TakenOver {
  std::int64_t taken = 0;    // rows that are now results of the folder
  std::int64_t known = 0;    // cells whose result the folder had, or that a worker has now
  std::int64_t open = 0;     // rows without a finished run and its loss
  std::int64_t foreign = 0;  // rows of cells that the sweep does not ask for
};

/// Records the finished cells of `rows` as results of the folder, which prepare() has made, and decides what
/// they allow to decide. Results that the folder has stand. UserError, and the row is not written: it was
/// trained on a store of another size, or with another config than the sweep gives its cell, or it stands
/// there twice.
TakenOver take_over(const Sweep& sweep, const SweepFolder& folder, const DataSize& data,
                    std::span<const Row> rows);

}  // namespace fathom::isoflop
