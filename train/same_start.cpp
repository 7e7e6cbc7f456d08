#include "train/same_start.h"

#include <vector>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/config/parse.h"
#include "src/config/print.h"

namespace fathom {

namespace {

// What may differ from host to host: where files are, of which the content is compared, and which device.
std::string config_to_compare(Config config) {
  config.data.train.clear();
  config.data.valid.clear();
  config.data.tokenizer.clear();
  config.device = "cpu";
  return to_yaml(config);
}

// "train.lr: 0.001 there, 0.002 here"
std::string keys_that_differ(const std::string& mine, const std::string& theirs) {
  std::string lines =
      difference(parse_config(mine, "rank's config"), parse_config(theirs, "rank 0's config"));
  while (!lines.empty() && lines.back() == '\n') lines.pop_back();
  for (std::size_t end = 0; (end = lines.find('\n', end)) != std::string::npos;) lines.replace(end, 1, "; ");
  return lines;
}

}  // namespace

void require_same_start(Ranks& ranks, const TrainingInputs& inputs, const std::string& build) {
  if (ranks.alone()) return;
  Communicator& comm = ranks.comm();
  const auto refuse = [&](std::size_t rank, const std::string& what) {
    return UserError(fmt::format("Rank {} ({}) {} than rank 0 ({}).", rank,
                                 comm.where(static_cast<int>(rank)), what, comm.where(0)),
                     "Start all ranks with the same command, program and files.");
  };
  const std::vector<std::string> configs = comm.gather(config_to_compare(inputs.config));
  for (std::size_t r = 1; r < configs.size(); ++r) {
    if (configs[r] == configs[0]) continue;
    const std::string keys = keys_that_differ(configs[r], configs[0]);
    throw refuse(r, fmt::format("was started with another config (here what it has: {})", keys));
  }
  struct Item {
    const char* what;
    std::string mine;
  };
  for (const Item& item :
       {Item{"runs another program", build}, Item{"has another training text", inputs.train->content_hash()},
        Item{"has another validation text", inputs.valid ? inputs.valid->content_hash() : "none"},
        Item{"has another tokenizer", inputs.train->tokenizer_hash()}}) {
    const std::vector<std::string> all = comm.gather(item.mine);
    for (std::size_t r = 1; r < all.size(); ++r) {
      if (all[r] != all[0]) throw refuse(r, fmt::format("{} ({}, not {})", item.what, all[r], all[0]));
    }
  }
}

}  // namespace fathom
