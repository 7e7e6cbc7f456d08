#include "src/model/checkpoint.h"

#include <fstream>
#include <set>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/config/parse.h"
#include "src/io/hdf5_file.h"
#include "src/model/exchange.h"

namespace fathom {

namespace {

constexpr const char* kParameters = "parameters/";
constexpr const char* kFirstMoment = "optimizer/m/";
constexpr const char* kSecondMoment = "optimizer/v/";

// One tensor as a dataset of its own dtype.
void write_tensor(H5Writer& file, const std::string& name, Backend& backend, const Tensor& t,
                  const Shape& shape) {
  if (t.dtype() == DType::F64) {
    file.write<double>(name, to_host<double>(backend, t), shape.dims());
  } else {
    file.write<float>(name, to_host<float>(backend, t), shape.dims());
  }
}

// What a checkpoint holds for one tensor, checked but not yet in the model.
struct Loaded {
  Tensor target;
  std::vector<float> f32;
  std::vector<double> f64;
};

constexpr const char* kOtherModel =
    "Use the config that it was trained with (it is inside the checkpoint and in its run folder).";

// Names and shapes, before anything is allocated for them.
void require_parameters(const H5Reader& file, const std::vector<ParameterSpec>& specs) {
  std::set<std::string> expected;
  for (const ParameterSpec& spec : specs) {
    const std::string name = kParameters + spec.name;
    expected.insert(spec.name);
    if (!file.has(name)) {
      throw UserError(
          fmt::format("{} has no {}, which this model needs: it is a checkpoint of another model.",
                      file.path(), name),
          kOtherModel);
    }
    if (file.dims(name) != spec.shape.dims()) {
      throw UserError(fmt::format("{}: {} is {}, this model needs {}: it is a checkpoint of another shape.",
                                  file.path(), name, Shape(file.dims(name)).str(), spec.shape.str()),
                      kOtherModel);
    }
  }
  for (const std::string& name : file.list("parameters")) {
    if (expected.contains(name)) continue;
    throw UserError(
        fmt::format("{} holds {}, which this model does not have: it is a checkpoint of another model.",
                    file.path(), name),
        kOtherModel);
  }
}

Loaded read_tensor(const H5Reader& file, const std::string& name, const Tensor& target) {
  Loaded loaded{target, {}, {}};
  const auto size = static_cast<std::size_t>(target.size());
  if (target.dtype() == DType::F64) {
    file.read_into<double>(name, (loaded.f64.resize(size), loaded.f64));
  } else {
    file.read_into<float>(name, (loaded.f32.resize(size), loaded.f32));
  }
  return loaded;
}

void put(Backend& backend, const Loaded& loaded) {
  if (loaded.target.dtype() == DType::F64) {
    from_host(backend, loaded.target, loaded.f64);
  } else {
    from_host(backend, loaded.target, loaded.f32);
  }
}

// The part of a moment's arena that belongs to a parameter: the arenas share one layout.
Tensor like_parameter(const ParameterSet& parameters, const Tensor& arena, const Tensor& parameter) {
  const auto* begin = static_cast<const std::byte*>(parameters.masters().data());
  const auto offset = static_cast<const std::byte*>(parameter.data()) - begin;
  const std::int64_t first = offset / static_cast<std::int64_t>(size_of(parameter.dtype()));
  return arena.rows(first, first + parameter.size());
}

CheckpointMeta read_meta(const H5Reader& file) {
  CheckpointMeta meta;
  TrainingState& s = meta.state;
  s.step = file.get_int("step");
  s.tokens = file.get_int("tokens");
  s.sequences = file.get_int("sequences");
  s.flops = file.get_double("flops");
  s.seconds = file.get_double("seconds");
  s.loss_average = file.get_double("loss_average");
  s.steps_averaged = file.get_int("steps_averaged");
  s.skipped_in_a_row = file.get_int("skipped_in_a_row");
  s.best_val_loss = file.get_double("best_val_loss");
  s.best_step = file.get_int("best_step");
  meta.tokenizer_kind = file.get_string("tokenizer_kind");
  meta.tokenizer_hash = file.get_string("tokenizer_hash");
  meta.store_hash = file.get_string("store_hash");
  meta.git_sha = file.get_string("git_sha");
  meta.config_yaml = file.read_text("config.yaml");
  if (s.step < 0 || s.tokens < 0 || s.sequences < 0) {
    throw UserError(
        fmt::format("{} has a negative step, token or sequence count: it is not a checkpoint that Fathom "
                    "wrote.",
                    file.path()));
  }
  return meta;
}

// Everything is read and checked before the first value is put.
void load_parameters(const H5Reader& file, Context& c, ParameterSet& parameters, OptimizerState* optimizer) {
  require_parameters(file, parameters.specs());
  std::vector<Loaded> all;
  for (const ParameterSpec& spec : parameters.specs()) {
    const Tensor& t = parameters.master(spec.name);
    all.push_back(read_tensor(file, kParameters + spec.name, t));
    if (optimizer == nullptr) continue;
    all.push_back(read_tensor(file, kFirstMoment + spec.name, like_parameter(parameters, optimizer->m, t)));
    all.push_back(read_tensor(file, kSecondMoment + spec.name, like_parameter(parameters, optimizer->v, t)));
  }
  for (const Loaded& loaded : all) put(c.backend(), loaded);
  parameters.refresh_working_copy(c);
}

}  // namespace

void save_checkpoint(const std::filesystem::path& path, Context& c, const ParameterSet& parameters,
                     const OptimizerState& optimizer, const CheckpointMeta& meta) {
  const auto moments = [&](Moment m) { return m == Moment::First ? optimizer.m : optimizer.v; };
  save_checkpoint(path, c, parameters, moments, meta);
}

void save_checkpoint(const std::filesystem::path& path, Context& c, const ParameterSet& parameters,
                     const Moments& moments, const CheckpointMeta& meta) {
  H5Writer file(path.string(), kCheckpointKind);
  const TrainingState& s = meta.state;
  file.set_int("step", s.step);
  file.set_int("tokens", s.tokens);
  file.set_int("sequences", s.sequences);
  file.set_double("flops", s.flops);
  file.set_double("seconds", s.seconds);
  file.set_double("loss_average", s.loss_average);
  file.set_int("steps_averaged", s.steps_averaged);
  file.set_int("skipped_in_a_row", s.skipped_in_a_row);
  file.set_double("best_val_loss", s.best_val_loss);
  file.set_int("best_step", s.best_step);
  file.set_string("tokenizer_kind", meta.tokenizer_kind);
  file.set_string("tokenizer_hash", meta.tokenizer_hash);
  file.set_string("store_hash", meta.store_hash);
  file.set_string("git_sha", meta.git_sha);
  file.write_text("config.yaml", meta.config_yaml);
  Backend& backend = c.backend();
  for (const ParameterSpec& spec : parameters.specs()) {
    write_tensor(file, kParameters + spec.name, backend, parameters.master(spec.name), spec.shape);
  }
  for (const Moment moment : {Moment::First, Moment::Second}) {
    const Tensor arena = moments(moment);
    const char* folder = moment == Moment::First ? kFirstMoment : kSecondMoment;
    for (const ParameterSpec& spec : parameters.specs()) {
      const Tensor part = like_parameter(parameters, arena, parameters.master(spec.name));
      write_tensor(file, folder + spec.name, backend, part, spec.shape);
    }
  }
  file.commit();
}

CheckpointMeta read_checkpoint_meta(const std::filesystem::path& path) {
  return read_meta(H5Reader(path.string(), kCheckpointKind));
}

CheckpointMeta load_checkpoint(const std::filesystem::path& path, Context& c, ParameterSet& parameters,
                               OptimizerState* optimizer) {
  const H5Reader file(path.string(), kCheckpointKind);
  CheckpointMeta meta = read_meta(file);
  load_parameters(file, c, parameters, optimizer);
  return meta;
}

std::filesystem::path find_checkpoint(const std::filesystem::path& path) {
  namespace fs = std::filesystem;
  std::error_code error;
  if (fs::is_regular_file(path, error)) return path;
  if (is_exported_model(path)) return path / "config.json";
  if (!fs::is_directory(path, error)) {
    throw UserError(fmt::format(
        "{} does not exist: expected a run folder, a checkpoint file or an exported model.", path.string()));
  }
  const fs::path folder = path / "checkpoints";
  std::ifstream latest(path / "latest");
  std::string name;
  if (latest && std::getline(latest, name) &&
      fs::is_regular_file(folder / fs::path(name).filename(), error)) {
    return folder / fs::path(name).filename();
  }
  std::string newest;  // names are padded to eight digits, so a longer one is a later step
  for (const auto& entry : fs::directory_iterator(folder, error)) {
    const std::string file = entry.path().filename().string();
    if (!file.starts_with("step_") || !file.ends_with(".h5")) continue;
    if (std::pair(file.size(), file) > std::pair(newest.size(), newest)) newest = file;
  }
  if (newest.empty()) {
    throw UserError(fmt::format("{} has no checkpoint yet (looked in {}).", path.string(), folder.string()),
                    "Train it with fathom train, or name a checkpoint file.");
  }
  return folder / newest;
}

LoadedModel load_model(const std::filesystem::path& path, Context& c) {
  return load_model(path, [&c](const Config&) -> Context& { return c; });
}

LoadedModel load_model(const std::filesystem::path& path,
                       const std::function<Context&(const Config&)>& context_for) {
  if (is_exported_model(path)) return load_exported_model(path, context_for);
  LoadedModel loaded;
  loaded.checkpoint = find_checkpoint(path);
  const H5Reader file(loaded.checkpoint.string(), kCheckpointKind);  // verified once, read from twice
  loaded.meta = read_meta(file);
  loaded.config = parse_config(loaded.meta.config_yaml, loaded.checkpoint.string() + ":config.yaml");
  require_parameters(file, declare_parameters(loaded.config.model, loaded.config.routing).specs());
  Context& c = context_for(loaded.config);
  loaded.model = std::make_unique<Transformer>(c, loaded.config.model, loaded.config.routing, false);
  load_parameters(file, c, loaded.model->parameters(), nullptr);
  return loaded;
}

}  // namespace fathom
