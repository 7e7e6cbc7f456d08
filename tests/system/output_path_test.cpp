// An output that would destroy an input, or a file of another kind, is refused before a byte is written.
#include <filesystem>

#include <gtest/gtest.h>

#include "tests/system/cli.h"

namespace fathom {
namespace {

namespace fs = std::filesystem;
using testing::expect_refusal;
using testing::Experiment;
using testing::fathom_command;
using testing::read_bytes;
using testing::write_bytes;

class OutputPath : public ::testing::Test {
 protected:
  // `arguments` must be refused with `status`, and `file` stays as it was.
  void spared(const std::string& file, const std::string& arguments, int status,
              std::initializer_list<std::string> words) const {
    SCOPED_TRACE(arguments);
    const std::string before = read_bytes(e / file);
    expect_refusal(fathom_command(e, arguments), status, words);
    EXPECT_TRUE(read_bytes(e / file) == before) << file << " was changed";
    EXPECT_FALSE(fs::exists(e / (file + ".tmp")));
  }
  void succeeds(const std::string& arguments) const {
    const auto outcome = fathom_command(e, arguments);
    EXPECT_EQ(outcome.status, 0) << arguments << ": " << outcome.err;
  }

  Experiment e;
};

TEST_F(OutputPath, OfPrepareIsNoInput) {
  write_bytes(e / "s.txt", "some text");
  spared("s.txt", "data prepare s.txt -o s.txt", 2, {"-o s.txt", "an input", "another path"});
  spared("s.txt", "data prepare text.jsonl ./s.txt -o s.txt", 2, {"s.txt"});
  fs::create_symlink("s.txt", e / "link.txt");
  spared("s.txt", "data prepare s.txt -o link.txt", 2, {"link.txt", "s.txt"});
  // The validation store lies beside the other, and the temporary file under the name of either + .tmp.
  fs::copy_file(e / "text.jsonl", e / "x.valid.h5");
  spared("x.valid.h5", "data prepare x.valid.h5 -o x.h5 --valid-fraction 0.1", 2, {"x.valid.h5"});
  write_bytes(e / "y.h5.tmp", "some text");
  expect_refusal(fathom_command(e, "data prepare y.h5.tmp -o y.h5"), 2, {"y.h5.tmp"});
  EXPECT_EQ(read_bytes(e / "y.h5.tmp"), "some text");
  // A tokenizer is read as well.
  succeeds("tokenizer train text.jsonl --vocab 500 -o bpe.model");
  spared("bpe.model", "data prepare text.jsonl --tokenizer bpe.model -o bpe.model", 2, {"bpe.model"});
  const std::string ids = std::string(2000, '\1');
  write_bytes(e / "a.bin", ids);
  spared("a.bin", "data prepare a.bin --vocab-size 300 -o a.bin", 2, {"a.bin"});
}

TEST_F(OutputPath, OfPrepareReplacesStoresOnly) {
  write_bytes(e / "notes.md", "what I know");
  spared("notes.md", "data prepare text.jsonl -o notes.md", 1, {"notes.md", "not a token store"});
  write_bytes(e / "b.valid.h5", "mine");
  spared("b.valid.h5", "data prepare text.jsonl -o b.h5 --valid-fraction 0.1", 1,
         {"b.valid.h5", "not a token store"});
  EXPECT_FALSE(fs::exists(e / "b.h5"));
  e.trained("dense", "run", "--set train.steps=2");
  const std::string checkpoint = "run/checkpoints/step_00000002.h5";
  spared(checkpoint, "data prepare text.jsonl -o " + checkpoint, 1, {checkpoint, "not a token store"});
  succeeds("data prepare text.jsonl -o again.h5");
  succeeds("data prepare text.jsonl -o again.h5");
  write_bytes(e / "empty.h5", "");
  succeeds("data prepare text.jsonl -o empty.h5");
}

TEST_F(OutputPath, OfTokenizerTrain) {
  spared("text.jsonl", "tokenizer train text.jsonl --vocab 500 -o text.jsonl", 2,
         {"-o text.jsonl", "an input"});
  spared("train.h5", "tokenizer train text.jsonl --vocab 500 -o train.h5", 1,
         {"train.h5", "not a tokenizer model"});
  write_bytes(e / "notes.md", "\n\n\nwhat I know");
  spared("notes.md", "tokenizer train text.jsonl --vocab 500 -o notes.md", 1, {"notes.md"});
  succeeds("tokenizer train text.jsonl --vocab 500 -o bpe.model");
  succeeds("tokenizer train text.jsonl --vocab 520 -o bpe.model");
}

TEST_F(OutputPath, OfSyntheticText) {
  const std::string make = "data synthetic --bytes 1000 -o ";
  write_bytes(e / "notes.txt", "what I know");
  spared("notes.txt", make + "notes.txt", 1, {"notes.txt", "not synthetic text", "another path"});
  write_bytes(e / "old.jsonl", "{\"text\":\"It was a dark night.\"}\n");
  spared("old.jsonl", make + "old.jsonl", 1, {"old.jsonl"});
  spared("train.h5", make + "train.h5", 1, {"train.h5"});
  write_bytes(e / "mine.jsonl", "{\"text\":\"Mara lives in Paris.\"}\n");
  spared("mine.jsonl", make + "mine.jsonl", 1, {"mine.jsonl"});
  write_bytes(e / "empty.txt", "");
  for (const char* const name : {"empty.txt", "s.jsonl", "s.jsonl"}) succeeds(make + name);
  // Every seed's is of the kind, and so is the other form.
  for (int seed = 0; seed < 20; ++seed) succeeds(make + "s.txt --seed " + std::to_string(seed));
  fs::copy_file(e / "s.jsonl", e / "s.txt", fs::copy_options::overwrite_existing);
  succeeds(make + "s.txt");
}

TEST_F(OutputPath, OfDumpedLogits) {
  e.trained("dense", "run", "--set train.steps=2 --set train.checkpoint_every=1");
  const std::string newest = "run/checkpoints/step_00000002.h5";
  const std::string older = "run/checkpoints/step_00000001.h5";
  const std::string dump = "eval run --prompt-ids 1,2 --dump-logits ";
  spared(newest, dump + newest, 2, {"--dump-logits " + newest, "an input"});
  spared(newest, "eval " + newest + " --prompt-ids 1,2 --dump-logits " + newest, 2, {newest});
  spared("train.h5", dump + "train.h5 --data train.h5", 2, {"train.h5"});
  spared(older, dump + older, 1, {older, "not logits"});
  spared("train.valid.h5", dump + "train.valid.h5", 1, {"train.valid.h5", "not logits"});
  spared("text.jsonl", dump + "text.jsonl", 1, {"text.jsonl", "not logits"});
  succeeds(dump + "logits.h5");
  succeeds(dump + "logits.h5");
}

TEST_F(OutputPath, OfReport) {
  e.trained("dense", "run", "--set train.steps=2");
  for (const std::string name : {"metrics.jsonl", "config.yaml", "plan.json"}) {
    spared("run/" + name, "report run -o run/" + name, 2, {"run/" + name, "an input"});
  }
  for (const std::string name : {"latest", "train.log", "checkpoints/step_00000002.h5"}) {
    spared("run/" + name, "report run -o run/" + name, 1, {"run/" + name, "not an HTML page"});
  }
  write_bytes(e / "page.csv", "name,age\r\nMara,7\r\n");
  spared("page.csv", "report run -o page.html", 1, {"page.csv", "not a report's CSV"});
  EXPECT_FALSE(fs::exists(e / "page.html"));
  succeeds("report run -o run/report.html");
  succeeds("report run -o run/report.html");
  write_bytes(e / "other.html", "\n <!doctype HTML>\n<p>");
  succeeds("report run -o other.html");
}

}  // namespace
}  // namespace fathom
