// A sweep's folder, which any number of workers share.
//
//   sweep.yaml  base.yaml        the sweep as it was started (base.yaml: the config that it builds on)
//   data.json                    the training store's size, for status and report where the store is not
//   cells/ID/                    a run folder (train/run_folder.h)
//   claims/ID.lock  ID.owner     who runs the cell now (claim.h)
//   results/ID.json              the cell's row: done, or failed with the reason; whole or absent
//   decisions/NAME.json          what results have decided, once: a family's learning rate, sizes near a
//   minimum
#pragma once

#include <filesystem>
#include <optional>
#include <string>

#include "train/isoflop/cells.h"
#include "train/isoflop/claim.h"
#include "train/isoflop/row.h"

namespace fathom::isoflop {

/// Of the training store.
struct DataSize {
  std::int64_t tokens = 0;
  std::int64_t vocab = 0;

  bool operator==(const DataSize&) const = default;
};

class SweepFolder {
 public:
  explicit SweepFolder(std::filesystem::path path) : path_(std::move(path)) {}

  /// Makes the folder and leaves a copy of the sweep in it. A sweep file that has changed since takes the
  /// copy's place: cells that are done are checked against it one by one. UserError: the disk refuses, or the
  /// folder's cells were trained on another store.
  void prepare(const Sweep& sweep, const DataSize& data) const;
  /// What prepare() recorded; nothing in a folder that it has not seen.
  std::optional<DataSize> data_size() const;

  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path run(const std::string& id) const { return path_ / "cells" / id; }
  std::filesystem::path claim(const std::string& id) const { return path_ / "claims" / id; }
  std::filesystem::path result(const std::string& id) const { return path_ / "results" / (id + ".json"); }

  /// The recorded row; nothing while the cell has not ended. UserError: unreadable.
  std::optional<Row> read_result(const std::string& id) const;
  void write_result(const Row& row) const;
  void remove_result(const std::string& id) const;

  /// What is decided so far; with `decide`, what the results allow to decide now is decided and recorded.
  Decisions decisions(const Sweep& sweep) const;
  Decisions decide(const Sweep& sweep) const;

 private:
  std::filesystem::path path_;
};

/// Whether `path` is a folder that prepare() made.
bool is_sweep_folder(const std::filesystem::path& path);

}  // namespace fathom::isoflop
