// fathom bench gemm: the products of a training step, forward and both backwards, against a large square one;
// or forward beside the same product of codes of few bits.
#include <algorithm>
#include <charconv>
#include <memory>

#include <fmt/format.h>

#include "app/bench_kernels.h"
#include "app/gemm_rate.h"
#include "kernels/error.h"
#include "kernels/packed_matrix.h"
#include "kernels/row_codes.h"
#include "src/ops/hadamard.h"

namespace fathom::app {

namespace {

struct GemmFlags {
  KernelBenchFlags kernel;
  bool codes = false;
  std::int64_t rows = 0;
  std::string shape;
};

struct NamedShape {
  std::string name;
  LinearShape shape;
  bool onto_base = false;  // also as the product that ends a residual branch
};

struct Preset {
  const char* name;
  std::int64_t width, hidden;
};
constexpr Preset kPresets[] = {{"d12", 768, 2048}, {"d24", 1024, 2816}, {"d1b", 2048, 5632}};

std::vector<NamedShape> shapes_of_trainings(std::int64_t rows, std::int64_t head_rows, std::int64_t side) {
  constexpr std::int64_t kVocab = 32768;
  std::vector<NamedShape> all;
  for (const Preset& p : kPresets) {
    const std::string name = p.name;
    all.push_back({name + "_qkv", {rows, p.width, 3 * p.width}});
    all.push_back({name + "_out", {rows, p.width, p.width}, true});
    all.push_back({name + "_gate_up", {rows, p.width, 2 * p.hidden}});
    all.push_back({name + "_down", {rows, p.hidden, p.width}, true});
    all.push_back({name + "_head", {head_rows, p.width, kVocab}});
  }
  all.push_back({fmt::format("{}^3", side), {side, side, side}});
  return all;
}

LinearShape parse_shape(const std::string& text) {
  std::int64_t sizes[3] = {};
  const char* at = text.data();
  const char* end = at + text.size();
  for (int i = 0; i < 3; ++i) {
    const auto [stop, error] = std::from_chars(at, end, sizes[i]);
    const bool last = i == 2;
    const bool good =
        error == std::errc() && sizes[i] > 0 && (last ? stop == end : stop != end && *stop == 'x');
    if (!good) {
      throw UsageError(fmt::format("--shape is '{}'.", text),
                       "Expected ROWSxINxOUT, such as 65536x768x2304.");
    }
    at = stop + 1;
  }
  return {sizes[0], sizes[1], sizes[2]};
}

double flops_of(const LinearShape& s) {
  return 2.0 * static_cast<double>(s.rows) * static_cast<double>(s.in) * static_cast<double>(s.out);
}

struct Codes {
  Tensor codes, scales;
  PackedFormat format;
  PackedView view() const { return {codes, scales, format}; }
};

// Normal numbers as rows of few bits, one code a byte.
Codes quantized(KernelBench& bench, std::int64_t rows, std::int64_t columns, int bits) {
  const RowQuantization q{rows, columns, bits};
  Context& c = bench.context();
  Codes made{c.empty({rows, q.format().row_bytes()}, DType::U8), c.empty({rows}, DType::F32), q.format()};
  c.backend().quantize_rows(made.codes, made.scales, bench.compute({rows, columns}), q);
  return made;
}

// The same as weights have them: of 4 bits two a byte.
Codes weights(KernelBench& bench, std::int64_t rows, std::int64_t columns, int bits) {
  Codes made = quantized(bench, rows, columns, bits);
  if (bits == 8) return made;
  Backend& backend = bench.context().backend();
  const PackedFormat apart = made.format, packed{bits, columns, columns};
  std::vector<std::int8_t> codes(made.codes.bytes());
  backend.copy_to_host(codes.data(), made.codes.data(), codes.size());
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(rows * packed.row_bytes()));
  for (std::int64_t r = 0; r < rows; ++r) {
    pack_codes({bytes.data() + r * packed.row_bytes(), static_cast<std::size_t>(packed.code_bytes())},
               {codes.data() + r * apart.row_bytes(), static_cast<std::size_t>(columns)}, packed);
  }
  made.codes = bench.context().empty({rows, packed.row_bytes()}, DType::U8);
  made.format = packed;
  backend.copy_from_host(made.codes.data(), bytes.data(), bytes.size());
  return made;
}

// Rows as a norm or an activation leaves them, through a product of codes.
Launch layer(KernelBench& bench, const LinearShape& s, int bits, bool transforms) {
  const RowQuantization q{s.rows, s.in, 8};
  Context& c = bench.context();
  Codes rows{c.empty({s.rows, q.format().row_bytes()}, DType::U8), c.empty({s.rows}, DType::F32), q.format()};
  return [rows, q, s, &c, y = bench.compute({s.rows, s.out}), x = bench.compute({s.rows, s.in}),
          turned = transforms ? bench.compute({s.rows, s.in}) : Tensor(),
          h = transforms ? ops::Hadamard(c, s.in, 1) : ops::Hadamard(),
          w = weights(bench, s.out, s.in, bits)](Backend& b) {
    CodeSource from{.x = x};
    if (h.defined()) {
      from.hadamard = h.shape(s.rows, 1);
      from.matrix = h.matrix();
    }
    if (!h.defined()) {
      b.quantize_rows(rows.codes, rows.scales, x, q);
    } else if (!b.make_codes(rows.codes, rows.scales, from, q)) {
      h.apply(c, turned, x, s.rows, 1, s.in, s.in);
      b.quantize_rows(rows.codes, rows.scales, turned, q);
    }
    b.linear_codes_forward(y, rows.view(), w.view(), s);
  };
}

// Forward, and forward of rows of 8 bits with weights of 8 and of 4, and with what makes the rows codes.
void measure_codes(KernelBench& bench, const NamedShape& of, const Ceiling& ceiling) {
  const LinearShape& s = of.shape;
  const auto element = static_cast<double>(size_of(bench.context().compute_dtype()));
  const auto outputs = element * static_cast<double>(s.rows * s.out);
  double of_numbers = 0;  // seconds
  const auto print = [&](const std::string& direction, double seconds) {
    const nlohmann::json shape = {{"direction", direction},
                                  {"rows", s.rows},
                                  {"in", s.in},
                                  {"out", s.out},
                                  {"times_forward", of_numbers / seconds}};
    bench.print({of.name + " " + direction, shape, flops_of(s), "tflops", seconds, ceiling});
  };
  of_numbers =
      bench.seconds(outputs + element * static_cast<double>((s.rows + s.out) * s.in), [&]() -> Launch {
        return [y = bench.compute({s.rows, s.out}), x = bench.compute({s.rows, s.in}),
                w = bench.compute({s.out, s.in}), s](Backend& b) { b.linear_forward(y, x, w, s); };
      });
  print("forward", of_numbers);
  for (const int bits : {8, 4}) {
    const double bytes = outputs + static_cast<double>(s.rows * s.in + s.out * s.in * bits / 8);
    print(fmt::format("forward_w{}a8", bits), bench.seconds(bytes, [&]() -> Launch {
      return [y = bench.compute({s.rows, s.out}), x = quantized(bench, s.rows, s.in, 8),
              w = weights(bench, s.out, s.in, bits),
              s](Backend& b) { b.linear_codes_forward(y, x.view(), w.view(), s); };
    }));
    // The layer whole: its rows are numbers that become codes first, and before that are transformed or not.
    for (const bool transforms : {false, true}) {
      const double rows_bytes = element * static_cast<double>(s.rows * s.in);
      print(fmt::format("layer_{}w{}a8", transforms ? "hadamard_" : "", bits),
            bench.seconds(bytes + rows_bytes, [&] { return layer(bench, s, bits, transforms); }));
    }
  }
}

void measure(KernelBench& bench, const NamedShape& of, const Ceiling& ceiling) {
  const LinearShape& s = of.shape;
  const auto element = static_cast<double>(size_of(bench.context().compute_dtype()));
  const double bytes = element * static_cast<double>(s.rows * s.in + s.in * s.out + s.rows * s.out);
  const auto x = [&] { return bench.compute({s.rows, s.in}); };
  const auto w = [&] { return bench.compute({s.out, s.in}); };
  const auto y = [&] { return bench.compute({s.rows, s.out}); };
  const auto print = [&](const char* direction, double seconds) {
    const nlohmann::json shape = {{"direction", direction}, {"rows", s.rows}, {"in", s.in}, {"out", s.out}};
    bench.print({of.name + " " + direction, shape, flops_of(s), "tflops", seconds, ceiling});
  };
  print("forward", bench.seconds(bytes, [&]() -> Launch {
    return [out = y(), in = x(), weight = w(), s](Backend& b) { b.linear_forward(out, in, weight, s); };
  }));
  if (of.onto_base) {
    const double with_base = bytes + element * static_cast<double>(s.rows * s.out);
    print("forward_onto_base", bench.seconds(with_base, [&]() -> Launch {
      return [out = y(), base = y(), in = x(), weight = w(), s](Backend& b) {
        b.linear_add_forward(out, base, in, weight, s);
      };
    }));
  }
  print("dgrad", bench.seconds(bytes, [&]() -> Launch {
    return [dx = x(), dy = y(), weight = w(), s](Backend& b) { b.linear_backward_input(dx, dy, weight, s); };
  }));
  print("wgrad", bench.seconds(bytes, [&]() -> Launch {
    return [dw = bench.stat({s.out, s.in}), dy = y(), in = x(), s](Backend& b) {
      b.linear_backward_weight_accumulate(dw, dy, in, s);
    };
  }));
  // Of a step's first micro-batch.
  print("wgrad_overwrite", bench.seconds(bytes, [&]() -> Launch {
    return [dw = bench.stat({s.out, s.in}), dy = y(), in = x(), s](Backend& b) {
      b.linear_backward_weight(dw, dy, in, s);
    };
  }));
}

void run(const GemmFlags& flags, const Globals& globals) {
  std::vector<NamedShape> shapes;
  if (!flags.shape.empty()) shapes.push_back({flags.shape, parse_shape(flags.shape), true});
  KernelBench bench("gemm", flags.kernel, globals);
  const std::int64_t rows = flags.rows > 0 ? flags.rows : bench.on_cpu() ? 2048 : 65536;
  const std::int64_t side = bench.on_cpu() ? 1024 : 8192;
  if (shapes.empty()) shapes = shapes_of_trainings(rows, std::min<std::int64_t>(rows, 8192), side);
  const Ceiling ceiling{fmt::format("forward {}^3, same process", side), bench.gemm_rate() / 1e12};
  for (const NamedShape& s : shapes) (flags.codes ? measure_codes : measure)(bench, s, ceiling);
}

}  // namespace

void add_bench_gemm(CLI::App& bench, Globals& globals) {
  auto flags = std::make_shared<GemmFlags>();
  CLI::App* sub = bench.add_subcommand("gemm", "Matrix products of d12, d24 and d1b: TFLOP/s");
  sub->add_option("--rows", flags->rows, "Tokens; 0: 65536 on a GPU, 2048 on the CPU")
      ->capture_default_str()
      ->check(number_from_to(0, 1e9));
  sub->add_option("--shape", flags->shape, "Only y = x W^T of this shape")->type_name("ROWSxINxOUT");
  sub->add_flag("--codes", flags->codes,
                "Forward alone, and with rows of 8 bits and weights of 8 and 4, and the layer with what "
                "makes rows codes");
  add_kernel_bench_flags(*sub, flags->kernel, globals);
  sub->callback([flags, &globals] { run(*flags, globals); });
}

}  // namespace fathom::app
