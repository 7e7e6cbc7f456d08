#include "src/io/token_store.h"

#include <algorithm>
#include <limits>
#include <utility>
#include <variant>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/io/checksum.h"
#include "src/io/hdf5_file.h"

namespace fathom {

namespace {

constexpr std::int64_t kTokenChunk = std::int64_t{1} << 16;
constexpr std::int64_t kDocumentChunk = std::int64_t{1} << 10;
constexpr std::int64_t kScanBlock = std::int64_t{1} << 20;
constexpr std::int64_t kMaxNarrowVocab = 65536;  // uint16 ids

}  // namespace

TokenStoreInfo describe(const Tokenizer& tokenizer, std::string recipe) {
  TokenStoreInfo info;
  info.tokenizer_kind = tokenizer.kind();
  info.tokenizer_hash = tokenizer.hash();
  info.vocab_size = tokenizer.vocab_size();
  info.end_of_document = tokenizer.end_of_document();
  info.bos = tokenizer.bos();
  info.recipe = std::move(recipe);
  return info;
}

// ----------------------------------------------------------------------------------------------------
// writing

struct TokenStoreWriter::Impl {
  std::string path;
  TokenStoreInfo info;
  H5Writer file;
  bool narrow;
  bool finished = false;
  std::int64_t num_tokens = 0;
  std::int64_t num_documents = 0;
  std::int64_t text_bytes = 0;
  std::int64_t max_id = 0;
  StreamingHash source;
  std::vector<std::uint16_t> narrow_ids;
  std::vector<std::uint32_t> wide_ids;

  Impl(const std::string& p, TokenStoreInfo i)
      : path(p), info(std::move(i)), file(p, kTokenStoreKind), narrow(info.vocab_size <= kMaxNarrowVocab) {
    if (narrow) {
      file.create_stream<std::uint16_t>("tokens", kTokenChunk);
    } else {
      file.create_stream<std::uint32_t>("tokens", kTokenChunk);
    }
    file.create_stream<std::int64_t>("document_starts", kDocumentChunk);
    file.create_stream<std::uint64_t>("document_hashes", kDocumentChunk);
    append_start();
  }

  void append_start() {
    file.append<std::int64_t>("document_starts", std::span(&std::as_const(num_tokens), 1));
  }

  template <typename T>
  void append_ids(std::span<const std::int32_t> tokens, std::vector<T>& ids) {
    ids.resize(tokens.size());
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      const std::int32_t id = tokens[i];
      if (id < 0 || id >= info.vocab_size) {
        throw UserError(
            fmt::format("cannot write {}: the token id {} of document {} is outside the vocabulary [0, {}).",
                        path, id, num_documents, info.vocab_size));
      }
      max_id = std::max<std::int64_t>(max_id, id);
      ids[i] = static_cast<T>(id);
    }
    file.append<T>("tokens", ids);
    num_tokens += static_cast<std::int64_t>(tokens.size());
  }

  void append(std::span<const std::int32_t> tokens) {
    if (narrow) {
      append_ids(tokens, narrow_ids);
    } else {
      append_ids(tokens, wide_ids);
    }
  }

  // `content` is what the document is made of: its text, or its ids' bytes.
  void end_document(std::string_view content) {
    const std::uint64_t hash = checksum64(content);
    const std::uint64_t size = content.size();
    source.update(std::as_bytes(std::span(&size, 1)));  // "ab" + "c" is not "a" + "bc"
    source.update(content);
    file.append<std::uint64_t>("document_hashes", std::span(&hash, 1));
    ++num_documents;
    append_start();
  }
};

TokenStoreWriter::TokenStoreWriter(const std::string& path, TokenStoreInfo info)
    : impl_(std::make_unique<Impl>(path, std::move(info))) {}
TokenStoreWriter::~TokenStoreWriter() = default;
TokenStoreWriter::TokenStoreWriter(TokenStoreWriter&&) noexcept = default;
TokenStoreWriter& TokenStoreWriter::operator=(TokenStoreWriter&&) noexcept = default;

void TokenStoreWriter::add_document(std::span<const std::int32_t> tokens, std::string_view text) {
  if (impl_->info.end_of_document < 0)
    throw InternalError("[token store] documents of text need an end token");
  impl_->append(tokens);
  impl_->append(std::span(&impl_->info.end_of_document, 1));
  impl_->text_bytes += static_cast<std::int64_t>(text.size());
  impl_->end_document(text);
}

void TokenStoreWriter::add_tokens(std::span<const std::int32_t> tokens) {
  if (tokens.empty()) throw InternalError("[token store] a document without tokens");
  impl_->append(tokens);
  impl_->end_document({reinterpret_cast<const char*>(tokens.data()), tokens.size_bytes()});
}

std::int64_t TokenStoreWriter::num_tokens() const { return impl_->num_tokens; }
std::int64_t TokenStoreWriter::num_documents() const { return impl_->num_documents; }
std::int64_t TokenStoreWriter::text_bytes() const { return impl_->text_bytes; }

void TokenStoreWriter::finish() {
  Impl& i = *impl_;
  if (i.num_tokens == 0) {
    throw UserError(fmt::format("cannot write {}: there are no tokens, the text is empty.", i.path),
                    "Give at least one document that is not empty.");
  }
  i.file.set_string("tokenizer_kind", i.info.tokenizer_kind);
  i.file.set_string("tokenizer_hash", i.info.tokenizer_hash);
  i.file.set_int("vocab_size", i.info.vocab_size);
  i.file.set_int("end_of_document", i.info.end_of_document);
  i.file.set_int("bos", i.info.bos);
  i.file.set_string("recipe", i.info.recipe);
  i.file.set_int("num_tokens", i.num_tokens);
  i.file.set_int("num_documents", i.num_documents);
  i.file.set_int("max_id", i.max_id);
  i.file.set_int("text_bytes", i.text_bytes);
  i.file.set_string("source_hash", i.source.digest_hex());
  i.file.finish();
  i.finished = true;
}

void TokenStoreWriter::commit() {
  if (!impl_->finished) finish();
  impl_->file.commit();
}

// ----------------------------------------------------------------------------------------------------
// reading

struct TokenStore::Impl {
  H5Reader file;
  TokenStoreInfo info;
  std::int64_t num_tokens = 0;
  std::int64_t text_bytes = 0;
  std::string source_hash;
  std::vector<std::int64_t> starts;
  std::vector<std::uint64_t> hashes;
  bool narrow = true;
  bool in_memory = false;
  std::vector<std::uint16_t> narrow_ids;
  std::vector<std::uint32_t> wide_ids;

  explicit Impl(const std::string& path) : file(path, kTokenStoreKind) {}

  [[noreturn]] void fail(const std::string& what) const {
    throw UserError(fmt::format("{} is a token store that cannot be used: {}.", file.path(), what),
                    "Make it anew with fathom data prepare.");
  }

  void read_header() {
    info.tokenizer_kind = file.get_string("tokenizer_kind");
    info.tokenizer_hash = file.get_string("tokenizer_hash");
    info.vocab_size = file.get_int("vocab_size");
    info.recipe = file.get_string("recipe");
    num_tokens = file.get_int("num_tokens");
    text_bytes = file.get_int("text_bytes");
    source_hash = file.get_string("source_hash");
    const std::string& kind = info.tokenizer_kind;
    if (kind != "bytes" && kind != "sentencepiece" && kind != "bpe" && kind != "external") {
      fail(fmt::format("its tokenizer kind is \"{}\"; expected bytes, sentencepiece, bpe or external", kind));
    }
    if (info.vocab_size < 1 || info.vocab_size > std::numeric_limits<std::int32_t>::max()) {
      fail(fmt::format("vocab_size is {}; expected 1 to 2^31 - 1", info.vocab_size));
    }
    info.end_of_document = special_id("end_of_document");
    info.bos = special_id("bos");
    if (num_tokens < 1) fail(fmt::format("num_tokens is {}; expected at least 1", num_tokens));
    if (text_bytes < 0) fail(fmt::format("text_bytes is {}; expected 0 or more", text_bytes));
    const std::int64_t max_id = file.get_int("max_id");
    if (max_id < 0 || max_id >= info.vocab_size) {
      fail(fmt::format("max_id is {}, outside the vocabulary [0, {})", max_id, info.vocab_size));
    }
  }

  std::int32_t special_id(const std::string& name) const {
    const std::int64_t id = file.get_int(name);
    if (id < -1 || id >= info.vocab_size) {
      fail(fmt::format("{} is {}, outside the vocabulary [0, {})", name, id, info.vocab_size));
    }
    return static_cast<std::int32_t>(id);
  }

  void check_length(const std::string& name, std::int64_t expected) const {
    const std::vector<std::int64_t> dims = file.dims(name);
    if (dims.size() != 1 || dims[0] != expected) {
      fail(fmt::format("{} has the shape [{}]; expected [{}]", name, fmt::join(dims, ", "), expected));
    }
  }

  void read_documents() {
    const std::int64_t documents = file.get_int("num_documents");
    if (documents < 1 || documents > num_tokens) {
      fail(fmt::format("num_documents is {} for {} tokens", documents, num_tokens));
    }
    check_length("document_starts", documents + 1);
    check_length("document_hashes", documents);
    starts = file.read<std::int64_t>("document_starts");
    hashes = file.read<std::uint64_t>("document_hashes");
    if (starts.front() != 0 || starts.back() != num_tokens) {
      fail(fmt::format("documents start at {} and end at {}; expected 0 and {}", starts.front(),
                       starts.back(), num_tokens));
    }
    for (std::size_t i = 1; i < starts.size(); ++i) {
      if (starts[i] <= starts[i - 1]) {
        fail(fmt::format("document_starts are not ascending: document {} starts at {}, the next at {}", i - 1,
                         starts[i - 1], starts[i]));
      }
    }
  }

  template <typename T>
  void check_ids(std::span<const T> ids, std::int64_t first) const {
    const auto bad = std::find_if(ids.begin(), ids.end(), [this](T id) { return id >= info.vocab_size; });
    if (bad != ids.end()) {
      fail(fmt::format("token {} is the id {}, outside the vocabulary [0, {})", first + (bad - ids.begin()),
                       *bad, info.vocab_size));
    }
  }

  template <typename T>
  void read_tokens(std::int64_t memory_limit, std::vector<T>& ids) {
    in_memory = num_tokens <= memory_limit / static_cast<std::int64_t>(sizeof(T));
    if (in_memory) {
      ids = file.read<T>("tokens");
      check_ids<T>(ids, 0);
      return;
    }
    std::vector<T> block;
    for (std::int64_t first = 0; first < num_tokens; first += kScanBlock) {
      block.resize(static_cast<std::size_t>(std::min(kScanBlock, num_tokens - first)));
      file.read_rows<T>("tokens", first, block);
      check_ids<T>(block, first);
    }
  }

  template <typename T>
  void read(std::int64_t offset, std::span<std::int32_t> out, const std::vector<T>& ids) const {
    if (in_memory) {
      std::copy_n(ids.begin() + offset, out.size(), out.begin());
      return;
    }
    std::vector<T> block(out.size());
    file.read_rows<T>("tokens", offset, std::span<T>(block));
    std::copy(block.begin(), block.end(), out.begin());
  }
};

TokenStore TokenStore::open(const std::string& path, const Options& options) {
  auto impl = std::make_unique<Impl>(path);
  impl->read_header();
  impl->read_documents();
  impl->check_length("tokens", impl->num_tokens);
  impl->narrow = impl->info.vocab_size <= kMaxNarrowVocab;
  if (impl->narrow) {
    impl->read_tokens(options.memory_limit, impl->narrow_ids);
  } else {
    impl->read_tokens(options.memory_limit, impl->wide_ids);
  }
  return TokenStore(std::move(impl));
}

TokenStore::TokenStore(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
TokenStore::~TokenStore() = default;
TokenStore::TokenStore(TokenStore&&) noexcept = default;
TokenStore& TokenStore::operator=(TokenStore&&) noexcept = default;

void TokenStore::read(std::int64_t offset, std::span<std::int32_t> out) const {
  const auto size = static_cast<std::int64_t>(out.size());
  if (offset < 0 || size > impl_->num_tokens || offset > impl_->num_tokens - size) {
    throw InternalError(fmt::format("[token store] tokens {} to {} of {} in {}", offset, offset + size,
                                    impl_->num_tokens, path()));
  }
  if (impl_->narrow) {
    impl_->read(offset, out, impl_->narrow_ids);
  } else {
    impl_->read(offset, out, impl_->wide_ids);
  }
}

const std::string& TokenStore::path() const { return impl_->file.path(); }
const TokenStoreInfo& TokenStore::info() const { return impl_->info; }
std::int64_t TokenStore::num_tokens() const { return impl_->num_tokens; }
std::int64_t TokenStore::num_documents() const { return static_cast<std::int64_t>(impl_->hashes.size()); }
std::span<const std::int64_t> TokenStore::document_starts() const { return impl_->starts; }
std::span<const std::uint64_t> TokenStore::document_hashes() const { return impl_->hashes; }
std::int64_t TokenStore::text_bytes() const { return impl_->text_bytes; }
const std::string& TokenStore::source_hash() const { return impl_->source_hash; }
std::string TokenStore::content_hash() const { return to_hex(impl_->file.checksum()); }

void require_tokenizer(const TokenStore& store, const Tokenizer& tokenizer,
                       const std::string& tokenizer_path) {
  if (store.tokenizer_hash() == tokenizer.hash()) return;
  throw UserError(
      fmt::format(
          "the token store {} was made with another tokenizer (hash {}, vocabulary {}) than {} (hash {}, "
          "vocabulary {}).",
          store.path(), store.tokenizer_hash(), store.vocab_size(), tokenizer_path, tokenizer.hash(),
          tokenizer.vocab_size()),
      "Give the tokenizer that the store was made with, or run fathom data prepare again with this one.");
}

}  // namespace fathom
