#include "train/metrics/tensorboard.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <gmock/gmock.h>
#include <nlohmann/json.hpp>

#include "kernels/error.h"
#include "tests/train/test_folder.h"

namespace fathom {
namespace {

using ::testing::HasSubstr;
using testing_support::fresh_folder;
using testing_support::message_of;
using testing_support::read_file;
using namespace std::string_literals;

// RFC 3720, appendix B.4.
TEST(Crc32c, KnownVectors) {
  EXPECT_EQ(crc32c(std::string(32, '\0')), 0x8A9136AAu);
  EXPECT_EQ(crc32c(std::string(32, '\xff')), 0x62A8AB43u);
  std::string ascending, descending;
  for (int i = 0; i < 32; ++i) {
    ascending.push_back(static_cast<char>(i));
    descending.push_back(static_cast<char>(31 - i));
  }
  EXPECT_EQ(crc32c(ascending), 0x46DD794Eu);
  EXPECT_EQ(crc32c(descending), 0x113FDB5Cu);
  EXPECT_EQ(crc32c("123456789"), 0xE3069283u);
  EXPECT_EQ(crc32c(""), 0u);
}

struct Frame {
  std::string payload;
};

// Walks the framing of a whole file and checks both CRCs of every record.
std::vector<Frame> frames(const std::string& bytes) {
  std::vector<Frame> out;
  const auto u32 = [&](std::size_t at) {
    std::uint32_t v = 0;
    std::memcpy(&v, bytes.data() + at, 4);
    return v;
  };
  std::size_t at = 0;
  while (at < bytes.size()) {
    std::uint64_t length = 0;
    EXPECT_LE(at + 12, bytes.size());
    std::memcpy(&length, bytes.data() + at, 8);
    EXPECT_EQ(u32(at + 8), masked_crc32c(std::string_view(bytes).substr(at, 8)));
    const std::string payload = bytes.substr(at + 12, length);
    EXPECT_EQ(payload.size(), length);
    EXPECT_EQ(u32(at + 12 + length), masked_crc32c(payload));
    out.push_back({payload});
    at += 16 + length;
  }
  return out;
}

TEST(TensorBoard, FramesAndWireFormatAreExact) {
  // Every event file begins with these bytes: a first record of 24 bytes, and the masked CRC of that length.
  EXPECT_EQ(masked_crc32c("\x18\0\0\0\0\0\0\0"s), 0x224B7FA3u);
  const auto folder = fresh_folder();
  TensorBoardWriter writer(folder);
  writer.scalar("train/loss", 300, 2.5);
  const auto records = frames(read_file(writer.path()));
  ASSERT_EQ(records.size(), 2u);
  EXPECT_EQ(records[0].payload.substr(0, 1), "\x09");  // wall_time
  EXPECT_EQ(records[0].payload.substr(9),
            "\x1a\x0d"
            "brain.Event:2");
  // step 300; summary { value { tag: "train/loss", simple_value: 2.5 } }
  EXPECT_EQ(records[1].payload.substr(9), "\x10\xac\x02\x2a\x13\x0a\x11\x0a\x0atrain/loss\x15\0\0\x20\x40"s);
}

TEST(TensorBoard, AnUnwritableFolderIsAUserError) {
  EXPECT_THAT(message_of<UserError>([] { TensorBoardWriter writer("/proc/absent"); }),
              HasSubstr("/proc/absent"));
}

// What a command prints, and whether it succeeded.
struct Output {
  int status = -1;
  std::string text;
};

Output output_of(const std::string& command) {
  Output out;
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return out;
  char buffer[4096];
  for (std::size_t n = 0; (n = fread(buffer, 1, sizeof buffer, pipe)) > 0;) out.text.append(buffer, n);
  out.status = pclose(pipe);
  return out;
}

TEST(TensorBoard, ItsOwnReaderReadsWhatWeWrite) {
  const char* configured = std::getenv("FATHOM_PYTHON");
  const std::string python = configured != nullptr ? configured : "python3";
  if (output_of("'" + python + "' -c 'import tensorboard' 2>/dev/null").status != 0) {
    GTEST_SKIP() << "no Python with tensorboard (" << python << "); set FATHOM_PYTHON to one that has it";
  }
  const auto folder = fresh_folder();
  StepRecord step;
  step.loss = 2.5;
  step.lr = 0.5;
  step.routed_layers = {1, 3};
  step.routed_fraction = {0.125, 0.25};
  EvalRecord eval;
  eval.val_topk = 3.0;
  eval.val_causal = 3.25;
  {
    TensorBoardWriter writer(folder);
    for (step.step = 1; step.step <= 4; ++step.step) writer.add(step);
    eval.step = 4;
    writer.add(eval);
  }
  {
    TensorBoardWriter writer(folder, 2);  // resumed after step 2: steps 3 and 4 of the first file are void
    step.step = 3;
    step.loss = 1.5;
    writer.add(step);
  }
  const Output read =
      output_of("TF_CPP_MIN_LOG_LEVEL=3 '" + python +
                "' '" FATHOM_SOURCE_DIR "/tests/train/read_events.py' '" + folder.string() + "' 2>/dev/null");
  ASSERT_EQ(read.status, 0) << read.text;
  const auto scalars = nlohmann::json::parse(read.text);
  EXPECT_EQ(scalars.at("train/loss"), nlohmann::json::parse("[[1, 2.5], [2, 2.5], [3, 1.5]]"));
  EXPECT_EQ(scalars.at("routing/layer_3/fraction").at(0), nlohmann::json::parse("[1, 0.25]"));
  EXPECT_EQ(scalars.at("train/lr").at(0).at(1), 0.5);
  EXPECT_FALSE(scalars.contains("train/aux_loss"));
}

}  // namespace
}  // namespace fathom
