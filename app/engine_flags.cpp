#include "app/engine_flags.h"

#include <algorithm>

#include <fmt/format.h>

#include "app/command.h"
#include "app/device.h"
#include "kernels/error.h"

namespace fathom::app {

EngineOptions EngineFlags::options(const Context& c, const Transformer& model, std::size_t requests) const {
  if (block % 16 != 0)
    throw UsageError(fmt::format("--block {} is no multiple of 16.", block), "64 is a good size.");
  EngineOptions o;
  o.max_sequences = std::min(sequences, std::max<std::int64_t>(1, static_cast<std::int64_t>(requests)));
  o.max_rows = std::max(chunk > 0 ? chunk : chunk_for(c.backend()), o.max_sequences);
  o.cache.block = block;
  const ModelConfig& m = model.config();
  const std::int64_t blocks = (m.max_seq_len + block - 1) / block + 1;
  const std::int64_t whole = KvCache::entry_bytes(c, model) * block * blocks * (m.depth + 1);
  const Backend& backend = c.backend();
  const double free = backend.is_cpu() ? 0.5 * static_cast<double>(machine_memory())
                                       : 0.8 * static_cast<double>(backend.free_memory_bytes());
  o.cache.bytes = cache_gb > 0 ? static_cast<std::int64_t>(cache_gb * 1e9)
                               : std::min(o.max_sequences * whole, static_cast<std::int64_t>(free));
  return o;
}

std::int64_t chunk_for(const Backend& backend) { return backend.is_cpu() ? 512 : 2048; }

void add_chunk_flag(CLI::App& sub, std::int64_t& chunk) {
  sub.add_option("--chunk", chunk,
                 "Tokens of a pass: prompts go in by so many; default: 512 on the CPU, 2048 on a GPU")
      ->check(number_from_to(1, 1e6));
}

void add_kv_flag(CLI::App& sub, int& kv, const char* what) {
  sub.add_option("--kv", kv, what)->check(CLI::IsMember({4, 8, 16}));
}

void add_engine_flags(CLI::App& sub, EngineFlags& flags) {
  sub.add_option("--sequences", flags.sequences, "Texts that are computed at the same time; others wait")
      ->capture_default_str()
      ->check(number_from_to(1, 1e6));
  add_chunk_flag(sub, flags.chunk);
  sub.add_option(
         "--cache-gb", flags.cache_gb,
         "Memory for keys and values, in 1e9 bytes; default: what the texts need, as far as it is there")
      ->check(number_from_to(1e-6, 1e6));
  sub.add_option("--block", flags.block, "Tokens of a block of the cache, a multiple of 16")
      ->capture_default_str()
      ->check(number_from_to(16, 1024));
  add_kv_flag(sub, flags.kv,
              "4 | 8 | 16: bits of the keys and values that are kept; 16: as they are computed; default: as "
              "the model was quantized, or 16");
}

}  // namespace fathom::app
