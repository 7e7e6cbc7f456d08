// Seeded fuzzing of the checkpoint reader: no crash, no hang, and nothing that was changed is accepted in
// silence. FATHOM_FUZZ_INPUTS sets the number of inputs of each test.
#include <filesystem>
#include <fstream>
#include <sstream>

#include <gtest/gtest.h>
#include <unistd.h>

#include "kernels/error.h"
#include "src/config/parse.h"
#include "src/config/print.h"
#include "src/config/resolve.h"
#include "src/io/hdf5_file.h"
#include "src/model/checkpoint.h"
#include "tests/io/mutate.h"
#include "train/optimizer.h"

namespace fathom {
namespace {

using testing::fuzz_inputs;
using testing::Mutator;

std::string file_bytes(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream out;
  out << in.rdbuf();
  return out.str();
}

Config tiny_config() {
  Config c;
  c.model.vocab_size = 16;
  c.model.width = 8;
  c.model.depth = 2;
  c.model.heads = 2;
  c.model.ffn_hidden = 8;
  c.routing.kind = RoutingKind::Mod;
  c.routing.causal.method = CausalMethod::Predictor;
  c.train.seq_len = 8;
  c.train.batch_tokens = 16;
  c.train.steps = 1;
  c.data.train = "train.h5";
  return resolve(c);
}

class CheckpointFuzz : public ::testing::Test {
 public:
  ~CheckpointFuzz() override { std::filesystem::remove(path_); }

 protected:
  CheckpointFuzz()
      : path_((std::filesystem::path(::testing::TempDir()) /
               ("checkpoint_fuzz_" + std::to_string(::getpid()) + ".h5"))
                  .string()),
        context_(make_cpu_backend({}, 1), DType::F32),
        config_(tiny_config()),
        model_(context_, config_.model, config_.routing, true),
        optimizer_(context_, model_.parameters(), config_.train) {
    model_.initialise(context_, 1);
    meta_.state.step = 10;
    meta_.config_yaml = to_yaml(config_);
    meta_.tokenizer_kind = "bytes";
    meta_.tokenizer_hash = "bytes";
    meta_.store_hash = "0123456789abcdef";
    meta_.git_sha = "unknown";
  }
  void save() { save_checkpoint(path_, context_, model_.parameters(), optimizer_.state(), meta_); }

  // What every user of a checkpoint does. True when it was accepted.
  bool accepted() {
    try {
      load_checkpoint(path_, context_, model_.parameters(), &optimizer_.state());
      const LoadedModel loaded = load_model(path_, context_);
      EXPECT_EQ(loaded.model->parameters().count(), count_of(loaded.config));
      return true;
    } catch (const UserError&) {
      return false;
    }
  }

  static std::int64_t count_of(const Config& config) {
    return declare_parameters(config.model, config.routing).count();
  }

  std::string path_;
  Context context_;
  Config config_;
  Transformer model_;
  AdamW optimizer_;
  CheckpointMeta meta_;
};

TEST_F(CheckpointFuzz, ChangedBytesAreRefused) {
  save();
  ASSERT_TRUE(accepted());
  const std::string good = file_bytes(path_);
  Mutator mutator(2);
  const std::int64_t inputs = fuzz_inputs(2000);
  for (std::int64_t i = 0; i < inputs; ++i) {
    const std::string mutant = mutator.mutate(good);
    if (mutant == good) continue;
    std::ofstream(path_, std::ios::binary).write(mutant.data(), static_cast<std::streamsize>(mutant.size()));
    ASSERT_FALSE(accepted()) << "mutant " << i;
  }
}

// The change happens before the checksum is made, so that it reaches the checks of the content.
TEST_F(CheckpointFuzz, ChangedContentIsRefusedOrWhole) {
  Mutator m(5);
  std::int64_t opened = 0;
  const std::int64_t inputs = fuzz_inputs(300);
  const CheckpointMeta good = meta_;
  for (std::int64_t i = 0; i < inputs; ++i) {
    meta_ = good;
    switch (m.below(3)) {
      case 0:
        meta_.config_yaml = m.mutate(meta_.config_yaml);
        break;
      case 1:
        meta_.state.step = m.integer();
        break;
      default: {  // a config that parses, of another shape, up to one that no machine could hold
        Config other = config_;
        other.model.width = 2 << m.below(15);
        other.model.depth = static_cast<std::int64_t>(1 + m.below(64));
        meta_.config_yaml = to_yaml(other);
      }
    }
    save();
    if (accepted()) ++opened;
  }
  EXPECT_GT(opened, 0);
  EXPECT_LT(opened, inputs);
}

TEST_F(CheckpointFuzz, MissingAndMisshapenDatasetsAreRefused) {
  Mutator m(6);
  const std::int64_t inputs = fuzz_inputs(300);
  for (std::int64_t i = 0; i < inputs; ++i) {
    const std::size_t victim = m.below(model_.parameters().specs().size());
    const bool drop = m.below(2) == 0;
    H5Writer out(path_, kCheckpointKind);
    for (const char* name :
         {"step", "tokens", "sequences", "steps_averaged", "skipped_in_a_row", "best_step"}) {
      out.set_int(name, 1);
    }
    for (const char* name : {"flops", "seconds", "loss_average", "best_val_loss"}) out.set_double(name, 1.0);
    for (const char* name : {"tokenizer_kind", "tokenizer_hash", "store_hash", "git_sha"})
      out.set_string(name, "x");
    out.write_text("config.yaml", to_yaml(config_));
    const auto& specs = model_.parameters().specs();
    for (std::size_t p = 0; p < specs.size(); ++p) {
      if (p == victim && drop) continue;
      std::vector<std::int64_t> dims = specs[p].shape.dims();
      if (p == victim) dims[m.below(dims.size())] = static_cast<std::int64_t>(1 + m.below(64)) + 64;
      const std::vector<float> values(static_cast<std::size_t>(Shape(dims).size()), 0.5F);
      out.write<float>("parameters/" + specs[p].name, values, dims);
    }
    out.commit();
    ASSERT_FALSE(accepted()) << specs[victim].name << (drop ? " was missing" : " had another shape");
  }
}

}  // namespace
}  // namespace fathom
