// What Backend::make_codes promises, by the ops that it names, one after the other.
#pragma once

#include "kernels/backend.h"

namespace fathom::testing_support {

/// Memory of a backend's for as long as it lives.
class Room {
 public:
  Room(Backend& backend, std::int64_t size, DType dtype)
      : backend_(backend),
        view_{nullptr, size, dtype},
        bytes_(static_cast<std::size_t>(size) * size_of(dtype)) {
    view_.data = backend.allocate(bytes_);
  }
  ~Room() { backend_.release(view_.data, bytes_); }
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;
  View view() const { return view_; }

 private:
  Backend& backend_;
  View view_;
  std::size_t bytes_;
};

inline void compose_codes(Backend& b, View codes, View scales, const CodeSource& from,
                          const RowQuantization& s) {
  const std::int64_t n = s.rows * s.columns;
  const DType dtype = from.x.dtype;
  const Room made(b, n, dtype), turned(b, n, dtype),
      rstd(b, s.rows, dtype == DType::F64 ? dtype : DType::F32);
  ConstView rows = from.x;
  RowQuantization q = s;
  if (from.norm) {
    const NormShape shape{s.rows, s.columns, from.norm_eps};
    if (from.addend) {
      b.add_rms_norm_forward(from.sum, made.view(), rstd.view(), from.x, from.addend, from.norm, shape);
    } else {
      b.rms_norm_forward(made.view(), rstd.view(), from.x, from.norm, shape);
    }
    rows = made.view();
    q.stride = 0;
  }
  if (from.swiglu) {
    b.swiglu_forward(made.view(), from.x, s.rows, s.columns);
    rows = made.view();
    q.stride = 0;
  }
  if (from.has_hadamard()) {
    HadamardShape shape = from.hadamard;
    shape.x_stride = q.x_row();
    b.hadamard_forward(turned.view(), rows, from.matrix, shape);
    rows = turned.view();
    q.stride = 0;
  }
  b.quantize_rows(codes, scales, rows, q);
  b.synchronize();  // before the room is given back
}

}  // namespace fathom::testing_support
