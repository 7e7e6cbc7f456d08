#include <utility>

#include <boost/asio/post.hpp>

#include "serve/http/session.h"

namespace fathom::serve {

void Exchange::post(std::function<void()> what) {
  asio::post(session_->executor(), [self = shared_from_this(), what = std::move(what)] {
    try {
      what();
    } catch (const std::exception& fault) {
      self->session_->failed(*self, fault);
    }
  });
}

void Exchange::reply(HttpReply reply) {
  if (!is_open()) return;
  reply.headers.insert(reply.headers.end(), headers_.begin(), headers_.end());
  session_->send_head(reply, reply.body.size());
  session_->send_body(std::move(reply.body));
  session_->flush();
  session_->end_answer();
}

void Exchange::begin(HttpReply head) {
  if (!is_open()) return;
  head.headers.insert(head.headers.end(), headers_.begin(), headers_.end());
  session_->send_head(head, std::nullopt);
  session_->flush();
}

void Exchange::write(std::string data) {
  if (is_open()) session_->send_body(std::move(data));
}

void Exchange::end() {
  if (is_open()) session_->end_answer();
}

void Exchange::on_gone(std::function<void()> gone) {
  if (is_gone_) return gone();
  if (is_open()) gone_ = std::move(gone);
}

void Exchange::set_gone() {
  is_gone_ = true;
  if (const auto gone = std::exchange(gone_, nullptr)) gone();
}

}  // namespace fathom::serve
