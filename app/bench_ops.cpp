// fathom bench ops: every op that is bound by memory, against the device's copy, and a copy of as many bytes.
//
// The bytes of an op are those of its contract (kernels/backend.h): each input read once, each output written
// once, what is added to both. Vectors of the width are left out.
#include <algorithm>
#include <map>
#include <memory>

#include <fmt/format.h>

#include "app/bench_kernels.h"
#include "kernels/error.h"
#include "src/ops/hadamard.h"

namespace fathom::app {

namespace {

struct OpsFlags {
  KernelBenchFlags kernel;
  std::int64_t rows = 0;
  std::int64_t width = 0;
  std::string only;
};

struct OpBench {
  std::string name;
  double bytes = 0;
  std::function<Launch()> make;
};

// The sizes of one round of ops, and how many bytes there are in what they touch.
class Ops {
 public:
  Ops(KernelBench& bench, std::int64_t rows, std::int64_t width)
      : bench_(bench),
        rows_(rows),
        width_(width),
        hidden_(width == 768 ? 2048 : width * 11 / 4),
        kept_((rows + 7) / 8) {}

  std::vector<OpBench> all() {
    add_elementwise();
    add_products_of_one_row();
    add_norms();
    add_attention_rows();
    add_activations();
    add_few_bits();
    add_rows();
    add_losses();
    add_optimizer();
    return std::move(ops_);
  }

 private:
  // Bytes of n elements.
  double compute(std::int64_t n) const {
    return static_cast<double>(n) * static_cast<double>(size_of(bench_.context().compute_dtype()));
  }
  static double stat(std::int64_t n) { return 4.0 * static_cast<double>(n); }

  Tensor matrix(std::int64_t rows, std::int64_t width) { return bench_.compute({rows, width}); }
  Tensor matrix() { return matrix(rows_, width_); }
  Tensor vector(std::int64_t n) { return bench_.stat({n}); }

  void op(const std::string& name, double bytes, std::function<Launch()> make) {
    ops_.push_back({name, bytes, std::move(make)});
  }

  void add_elementwise();
  void add_products_of_one_row();
  void add_norms();
  void add_attention_rows();
  void add_activations();
  void add_few_bits();
  void add_rows();
  void add_losses();
  void add_optimizer();

  KernelBench& bench_;
  std::int64_t rows_, width_, hidden_, kept_;
  std::vector<OpBench> ops_;
};

void Ops::add_elementwise() {
  const std::int64_t n = rows_ * width_;
  op("add", compute(3 * n), [this]() -> Launch {
    return [y = matrix(), a = matrix(), x = matrix()](Backend& b) { b.add(y, a, x); };
  });
  op("accumulate", compute(3 * n),
     [this]() -> Launch { return [y = matrix(), x = matrix()](Backend& b) { b.accumulate(y, x); }; });
  op("fill", compute(n), [this]() -> Launch { return [y = matrix()](Backend& b) { b.fill(y, 0.5); }; });
  op("cast from fp32", compute(n) + stat(n),
     [this, n]() -> Launch { return [y = matrix(), x = vector(n)](Backend& b) { b.cast(y, x); }; });
  op("sum_squares of fp32", stat(n),
     [this, n]() -> Launch { return [s = vector(1), x = vector(n)](Backend& b) { b.sum_squares(s, x); }; });
}

// What decoding does with gate and up: the weights are all that counts.
void Ops::add_products_of_one_row() {
  const LinearShape s{1, width_, 2 * hidden_};
  op("linear_forward of 1 row", compute(s.in * s.out), [this, s]() -> Launch {
    return [y = matrix(1, s.out), x = matrix(1, s.in), w = matrix(s.out, s.in), s](Backend& b) {
      b.linear_forward(y, x, w, s);
    };
  });
  for (const int bits : {4, 8}) {
    const PackedFormat f{bits, s.in, s.in % 128 == 0 ? 128 : s.in};
    op(fmt::format("linear_packed_forward of 1 row, {} bits", bits),
       static_cast<double>(s.out * f.row_bytes()) + stat(s.out * f.groups()), [this, s, f]() -> Launch {
         // Any byte is a code, or two.
         const Tensor words = bench_.ids(s.out * f.row_bytes() / 4, std::int64_t{1} << 31);
         return [y = matrix(1, s.out), x = matrix(1, s.in), words, scales = vector(s.out * f.groups()), s,
                 f](Backend& b) {
           const ConstView codes(words.data(), 4 * words.size(), DType::U8);
           b.linear_packed_forward(y, x, {codes, scales, f}, s);
         };
       });
  }
}

void Ops::add_norms() {
  const std::int64_t n = rows_ * width_;
  const NormShape s{rows_, width_};
  op("rms_norm_forward", compute(2 * n) + stat(rows_), [this, s]() -> Launch {
    return [y = matrix(), r = vector(rows_), x = matrix(), w = vector(width_), s](Backend& b) {
      b.rms_norm_forward(y, r, x, w, s);
    };
  });
  op("rms_norm_backward", compute(3 * n) + stat(rows_), [this, s]() -> Launch {
    return [dx = matrix(), dw = vector(width_), dy = matrix(), x = matrix(), w = vector(width_),
            r = vector(rows_), s](Backend& b) { b.rms_norm_backward(dx, dw, dy, x, w, r, s); };
  });
  op("add_rms_norm_forward", compute(4 * n) + stat(rows_), [this, s]() -> Launch {
    return [h = matrix(), y = matrix(), r = vector(rows_), x = matrix(), a = matrix(), w = vector(width_),
            s](Backend& b) { b.add_rms_norm_forward(h, y, r, x, a, w, s); };
  });
  op("add_rms_norm_backward", compute(4 * n) + stat(rows_), [this, s]() -> Launch {
    return
        [dx = matrix(), dw = vector(width_), dh = matrix(), dy = matrix(), h = matrix(), w = vector(width_),
         r = vector(rows_), s](Backend& b) { b.add_rms_norm_backward(dx, dw, dh, dy, h, w, r, s); };
  });
  op("rms_norm_backward_from_output with dh", compute(4 * n) + stat(rows_), [this, s]() -> Launch {
    return
        [dx = matrix(), dw = vector(width_), dh = matrix(), dy = matrix(), y = matrix(), w = vector(width_),
         r = vector(rows_), s](Backend& b) { b.rms_norm_backward_from_output(dx, dw, dh, dy, y, w, r, s); };
  });
}

void Ops::add_attention_rows() {
  constexpr std::int64_t kHead = 64;
  const std::int64_t heads = std::max<std::int64_t>(1, width_ / kHead);
  const QkvShape s{rows_, heads, heads, width_ / heads / 2 * 2};
  const std::int64_t n = rows_ * s.row_size();
  const auto qkv = [this, s] { return matrix(rows_, s.row_size()); };
  const auto positions = [this] { return bench_.ids(rows_, 2048); };
  op("rope_forward", compute(2 * n) + stat(rows_), [=]() -> Launch {
    return [y = qkv(), x = qkv(), p = positions(), s](Backend& b) { b.rope_forward(y, {}, x, p, {}, {}, s); };
  });
  op("rope_backward", compute(2 * n) + stat(rows_), [=]() -> Launch {
    return [dx = qkv(), dy = qkv(), p = positions(), s](Backend& b) {
      b.rope_backward(dx, {}, {}, dy, {}, {}, p, {}, {}, s);
    };
  });
  const auto norms = [=, this] { return vector(rows_ * (s.heads + s.kv_heads)); };
  const double rstd = stat(rows_ * (s.heads + s.kv_heads));
  op("rope_forward with QK-norm", compute(2 * n) + stat(rows_) + rstd, [=, this]() -> Launch {
    return [y = qkv(), r = norms(), x = qkv(), p = positions(), q = vector(s.head_dim),
            k = vector(s.head_dim), s](Backend& b) { b.rope_forward(y, r, x, p, q, k, s); };
  });
  op("rope_backward with QK-norm", compute(3 * n) + stat(rows_) + rstd, [=, this]() -> Launch {
    return [dx = qkv(), dq = vector(s.head_dim), dk = vector(s.head_dim), dy = qkv(), x = qkv(), r = norms(),
            p = positions(), q = vector(s.head_dim), k = vector(s.head_dim),
            s](Backend& b) { b.rope_backward(dx, dq, dk, dy, x, r, p, q, k, s); };
  });
}

void Ops::add_activations() {
  const std::int64_t rows = rows_, width = width_, hidden = hidden_;
  op("swiglu_forward", compute(3 * rows * hidden), [=, this]() -> Launch {
    return [h = matrix(rows, hidden), x = matrix(rows, 2 * hidden), rows, hidden](Backend& b) {
      b.swiglu_forward(h, x, rows, hidden);
    };
  });
  op("swiglu_backward", compute(5 * rows * hidden), [=, this]() -> Launch {
    return [dx = matrix(rows, 2 * hidden), dh = matrix(rows, hidden), x = matrix(rows, 2 * hidden), rows,
            hidden](Backend& b) { b.swiglu_backward(dx, dh, x, rows, hidden); };
  });
  op("swiglu_forward_beside_gate", compute(4 * rows * hidden), [=, this]() -> Launch {
    return [h = matrix(rows, 2 * hidden), x = matrix(rows, 2 * hidden), rows, hidden](Backend& b) {
      b.swiglu_forward_beside_gate(h, x, rows, hidden);
    };
  });
  op("swiglu_backward_from_output", compute(5 * rows * hidden), [=, this]() -> Launch {
    return [dx = matrix(rows, 2 * hidden), dh = matrix(rows, hidden), x = matrix(rows, 2 * hidden), rows,
            hidden](Backend& b) { b.swiglu_backward_from_output(dx, dh, x, rows, hidden); };
  });
  op("bias_silu_forward", compute(2 * rows * width), [=, this]() -> Launch {
    return [h = matrix(), x = matrix(), bias = vector(width), rows, width](Backend& b) {
      b.bias_silu_forward(h, x, bias, rows, width);
    };
  });
  op("bias_silu_backward", compute(3 * rows * width), [=, this]() -> Launch {
    return [dx = matrix(), dbias = vector(width), dh = matrix(), x = matrix(), bias = vector(width), rows,
            width](Backend& b) { b.bias_silu_backward(dx, dbias, dh, x, bias, rows, width); };
  });
  op("row_score_forward", compute(rows * width) + stat(rows), [=, this]() -> Launch {
    return [r = vector(rows), x = matrix(), w = vector(width), rows, width](Backend& b) {
      b.row_score_forward(r, x, w, {}, rows, width);
    };
  });
  op("row_score_backward_accumulate", compute(3 * rows * width) + stat(rows), [=, this]() -> Launch {
    return [dx = matrix(), dw = vector(width), dr = vector(rows), x = matrix(), w = vector(width), rows,
            width](Backend& b) { b.row_score_backward_accumulate(dx, dw, {}, dr, x, w, rows, width); };
  });
}

// What goes before products of rows of few bits: of what most products read, and of what W_down and W_O do.
void Ops::add_few_bits() {
  for (const std::int64_t columns : {width_, hidden_}) {
    const RowQuantization s{.rows = rows_, .columns = columns, .bits = 8};
    const std::int64_t bytes = s.rows * s.format().row_bytes();
    op(columns == width_ ? "quantize_rows" : "quantize_rows of hidden",
       compute(rows_ * columns) + static_cast<double>(bytes) + stat(rows_), [=, this]() -> Launch {
         const Tensor codes = bench_.context().empty({bytes}, DType::U8);
         return [codes, scales = vector(s.rows), x = matrix(s.rows, s.columns), s](Backend& b) {
           b.quantize_rows(codes, scales, x, s);
         };
       });
  }
  const auto transform = [this](const std::string& name, std::int64_t count, std::int64_t size,
                                std::int64_t inner) {
    const std::int64_t row = count * size * inner;
    op(name, compute(2 * rows_ * row), [=, this]() -> Launch {
      return [y = matrix(rows_, row), x = matrix(rows_, row), rows = rows_, count, row, &c = bench_.context(),
              h = ops::Hadamard(bench_.context(), size, inner)](Backend&) {
        h.apply(c, y, x, rows, count, row, row);
      };
    });
  };
  const std::int64_t heads = std::max<std::int64_t>(1, width_ / 128), head = width_ / heads;
  transform("hadamard_forward of hidden", 1, hidden_, 1);
  transform("hadamard_forward across heads", 1, heads, head);
  transform("hadamard_forward of heads", heads, head, 1);
}

void Ops::add_rows() {
  const std::int64_t rows = rows_, width = width_;
  const std::int64_t vocab =
      std::min<std::int64_t>(rows, 32768);  // so that the tokens name most of the table
  op("embedding_forward", compute((vocab + rows) * width) + stat(rows), [=, this]() -> Launch {
    return [y = matrix(), table = matrix(vocab, width), t = bench_.ids(rows, vocab), rows,
            width](Backend& b) { b.embedding_forward(y, table, t, rows, width); };
  });
  const double table_gradient = 2 * stat(vocab * width);
  op("embedding_backward_accumulate", compute(rows * width) + table_gradient + stat(rows),
     [=, this]() -> Launch {
       return [dtable = vector(vocab * width), dy = matrix(), t = bench_.ids(rows, vocab), rows,
               width](Backend& b) { b.embedding_backward_accumulate(dtable, dy, t, rows, width); };
     });
  const GatherShape s{rows, kept_, width};
  const double kept = compute(kept_ * width);
  const auto indices = [this] { return bench_.some_rows(rows_, kept_); };
  op("gather_rows_forward", 2 * kept + stat(kept_), [=, this]() -> Launch {
    return [y = matrix(s.rows, width), x = matrix(), i = indices(), s](Backend& b) {
      b.gather_rows_forward(y, x, i, s);
    };
  });
  op("gather_rows_backward_accumulate", 3 * kept + stat(kept_), [=, this]() -> Launch {
    return [dx = matrix(), dy = matrix(s.rows, width), i = indices(), s](Backend& b) {
      b.gather_rows_backward_accumulate(dx, dy, i, s);
    };
  });
  op("gated_scatter_forward in place", 3 * kept + 2 * stat(kept_), [=, this]() -> Launch {
    return [x = matrix(), f = matrix(s.rows, width), r = vector(rows), i = indices(), s](Backend& b) {
      b.gated_scatter_forward(x, x, f, r, i, GateKind::Sigmoid, s);
    };
  });
  op("gated_scatter_backward", 3 * kept + 4 * stat(kept_), [=, this]() -> Launch {
    return [df = matrix(s.rows, width), dr = vector(rows), dy = matrix(), f = matrix(s.rows, width),
            r = vector(rows), i = indices(),
            s](Backend& b) { b.gated_scatter_backward(df, dr, dy, f, r, i, GateKind::Sigmoid, s); };
  });
  const std::int64_t seq = std::min<std::int64_t>(rows, 2048), batch = rows / seq, keep = (seq + 7) / 8;
  op("top_k_rows", stat(batch * (seq + keep)), [=, this]() -> Launch {
    return [i = bench_.ids(batch * keep, 2), r = vector(batch * seq), batch, seq, keep](Backend& b) {
      b.top_k_rows(i, r, batch, seq, keep);
    };
  });
}

void Ops::add_losses() {
  constexpr std::int64_t kVocab = 32768;
  const std::int64_t rows = std::min<std::int64_t>(rows_, bench_.context().backend().head_chunk_rows());
  op("cross_entropy in place", compute(2 * rows * kVocab) + 2 * stat(rows), [=, this]() -> Launch {
    return [losses = vector(rows), x = matrix(rows, kVocab), t = bench_.ids(rows, kVocab), rows,
            vocab = kVocab](Backend& b) { b.cross_entropy(losses, x, x, t, rows, vocab, 1.0); };
  });
  op("membership_bce", 3 * stat(rows_) + stat(kept_), [this]() -> Launch {
    return [losses = vector(rows_), dr = vector(rows_), r = vector(rows_), i = bench_.some_rows(rows_, kept_),
            n = rows_](Backend& b) { b.membership_bce(losses, dr, r, i, n, 1.0); };
  });
  op("routing_statistics", 2 * stat(rows_) + stat(kept_), [this]() -> Launch {
    return [out = vector(8), r = vector(rows_), p = vector(rows_), i = bench_.some_rows(rows_, kept_),
            n = rows_](Backend& b) { b.routing_statistics(out, r, p, i, 0.0, n); };
  });
}

void Ops::add_optimizer() {
  const std::int64_t n = rows_ * width_;
  const bool copies = bench_.context().compute_dtype() == DType::BF16;
  op("adamw", stat(7 * n) + (copies ? compute(n) : 0), [this, n, copies]() -> Launch {
    Tensor working = copies ? matrix() : Tensor();
    Tensor v = vector(n);
    bench_.context().backend().fill(v, 1.0);  // squares: not negative
    const AdamWParams p{0.9, 0.95, 1e-8, 0.1};
    const UpdateNumbers now = update_numbers(p, 1e-3, 1);
    Tensor numbers = bench_.context().empty({kUpdateNumbers}, DType::F64);
    from_host<double>(bench_.context().backend(), numbers,
                      {now.lr, now.bias1, now.root_bias2, now.gradient_scale, now.applied});
    return [master = vector(n), working, m = vector(n), v, g = vector(n), numbers, p](Backend& b) {
      b.adamw(master, working, m, v, g, numbers, p);
    };
  });
}

void require_some(const std::vector<OpBench>& ops, const std::string& only) {
  std::vector<std::string> names;
  names.reserve(ops.size());
  for (const OpBench& op : ops) {
    if (op.name.find(only) != std::string::npos) return;
    names.push_back(op.name);
  }
  throw UsageError(fmt::format("--only {} is in no op's name.", only),
                   fmt::format("The ops are {}.", fmt::join(names, ", ")));
}

void run(const OpsFlags& flags, const Globals& globals) {
  KernelBench bench("ops", flags.kernel, globals);
  const std::int64_t rows = flags.rows > 0 ? flags.rows : bench.on_cpu() ? 2048 : 65536;
  std::vector<std::int64_t> widths = {768, 2048};
  if (flags.width > 0) widths = {flags.width};
  require_some(Ops(bench, rows, widths.front()).all(), flags.only);
  const Ceiling ceiling{"copy, same process", bench.copy_rate() / 1e9};
  // By bytes: many ops move as many.
  std::map<std::int64_t, double> copies;
  const auto equal_copy = [&](double bytes) {
    const auto half = static_cast<std::int64_t>(bytes / 2);
    const auto [found, is_new] = copies.try_emplace(half, 0.0);
    if (is_new) found->second = bench.copy_rate(half) / 1e9;
    return found->second;
  };
  for (const std::int64_t width : widths) {
    Ops ops(bench, rows, width);  // what makes the buffers refers to it
    for (const OpBench& op : ops.all()) {
      if (op.name.find(flags.only) == std::string::npos) continue;
      const nlohmann::json shape = {{"rows", rows}, {"width", width}, {"bytes", op.bytes}};
      bench.print({.what = op.name,
                   .shape = shape,
                   .amount = op.bytes,
                   .unit = "gb_per_s",
                   .seconds = bench.seconds(op.bytes, op.make),
                   .ceiling = ceiling,
                   .like_rate = equal_copy(op.bytes)});
    }
  }
}

}  // namespace

void add_bench_ops(CLI::App& bench, Globals& globals) {
  auto flags = std::make_shared<OpsFlags>();
  CLI::App* sub = bench.add_subcommand("ops", "Ops that are bound by memory: GB/s, share of the copy rate");
  sub->add_option("--rows", flags->rows, "Tokens; 0: 65536 on a GPU, 2048 on the CPU")
      ->capture_default_str()
      ->check(number_from_to(0, 1e9));
  sub->add_option("--width", flags->width, "Of the model; 0: 768 and 2048")
      ->capture_default_str()
      ->check(number_from_to(0, 1e6));
  sub->add_option("--only", flags->only, "Only ops whose name has this in it")->type_name("TEXT");
  add_kernel_bench_flags(*sub, flags->kernel, globals);
  sub->callback([flags, &globals] { run(*flags, globals); });
}

}  // namespace fathom::app
