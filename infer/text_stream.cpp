#include "infer/text_stream.h"

#include <algorithm>

namespace fathom {

std::string TextStream::add(std::int32_t id) {
  if (stopped_) return "";
  const std::size_t searched = settled_;  // there is no stop string in it
  pending_.push_back(id);
  text_.resize(settled_);
  text_ += text_of_pending(pending_.size());
  settle();
  std::size_t end = text_.size();
  for (const std::string& stop : stops_) {
    const std::size_t at = text_.find(stop, searched - std::min(searched, stop.size() - 1));
    if (at == std::string::npos || at > end) continue;
    end = at;
    stopped_ = true;
  }
  text_.resize(end);
  if (!stopped_) {
    end = settled_;
    for (const std::string& stop : stops_) {
      std::size_t begun = std::min(stop.size() - 1, settled_);
      while (begun > 0 && text_.compare(settled_ - begun, begun, stop, 0, begun) != 0) --begun;
      end = std::min(end, settled_ - begun);
    }
  }
  if (end <= given_) return "";
  const std::string news = text_.substr(given_, end - given_);
  given_ = end;
  return news;
}

// Of the first `count` of them.
std::string TextStream::text_of_pending(std::size_t count) const {
  std::vector<std::int32_t> ids = opening_;
  ids.insert(ids.end(), pending_.begin(), pending_.begin() + static_cast<std::ptrdiff_t>(count));
  return tokenizer_.decode(ids).substr(opening_bytes_);
}

void TextStream::settle() {
  const std::size_t open = std::min(tokenizer_.unsettled(pending_), pending_.size());
  if (opening_.empty()) {
    if (open > 0 || text_.empty()) return;
    opening_ = pending_;
    opening_bytes_ = text_.size();
  }
  const std::size_t closed = pending_.size() - open;
  settled_ = open == 0 ? text_.size() : settled_ + text_of_pending(closed).size();
  pending_.erase(pending_.begin(), pending_.begin() + static_cast<std::ptrdiff_t>(closed));
}

std::string TextStream::rest() {
  const std::string news = text_.substr(std::min(given_, text_.size()));
  given_ = text_.size();
  return news;
}

}  // namespace fathom
