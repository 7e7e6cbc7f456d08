// TensorBoard event files, written by hand: TFRecord framing around Event protobufs, scalars only.
//
// A record is: length (u64), masked CRC-32C of the length, payload, masked CRC-32C of the payload; little
// endian.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

#include "train/metrics/record.h"

namespace fathom {

/// CRC-32C (Castagnoli), as in RFC 3720.
std::uint32_t crc32c(std::string_view bytes);
/// TFRecord's mask, which keeps a CRC of data that holds CRCs from degenerating.
std::uint32_t masked_crc32c(std::string_view bytes);

class TensorBoardWriter {
 public:
  /// Starts a new events.out.tfevents.* file in `folder`. `step`: the steps done before this part of the run;
  /// what older files hold after it is dropped by TensorBoard (a SessionLog START event). UserError: cannot
  /// be created.
  explicit TensorBoardWriter(const std::filesystem::path& folder, std::int64_t step = 0);
  ~TensorBoardWriter();
  TensorBoardWriter(TensorBoardWriter&& other) noexcept;
  TensorBoardWriter& operator=(TensorBoardWriter&&) = delete;

  /// Every call ends in one write of whole records. Values that are not finite are written as they are.
  void scalar(std::string_view tag, std::int64_t step, double value);
  void add(const StepRecord& record);  // train/..., speed/..., routing/layer_3/...
  void add(const EvalRecord& record);  // val/...

  const std::filesystem::path& path() const { return path_; }

 private:
  void write(const std::string& bytes);

  std::filesystem::path path_;
  int fd_ = -1;
};

}  // namespace fathom
