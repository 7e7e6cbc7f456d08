// Which sequences a step trains on.
#include "train/data_loader.h"

#include <algorithm>
#include <numeric>
#include <set>

#include <gtest/gtest.h>

#include "kernels/error.h"
#include "tests/train/test_folder.h"

namespace fathom {
namespace {

using testing_support::fresh_folder;
using testing_support::message_of;
using Ids = std::vector<std::int32_t>;

// --- the permutation ---

TEST(Permuted, IsAPermutation) {
  std::vector<std::int64_t> sizes(200);
  std::iota(sizes.begin(), sizes.end(), 1);
  sizes.insert(sizes.end(), {211, 255, 256, 257, 997, 1009, 1023, 1024, 1025, 4099, 65537});
  for (const std::int64_t n : sizes) {
    for (const std::uint64_t key : {std::uint64_t{0}, std::uint64_t{1}, ~std::uint64_t{0}}) {
      std::vector<bool> seen(static_cast<std::size_t>(n), false);
      for (std::int64_t i = 0; i < n; ++i) {
        const std::int64_t image = permuted(i, n, key);
        ASSERT_GE(image, 0);
        ASSERT_LT(image, n);
        ASSERT_FALSE(seen[static_cast<std::size_t>(image)]) << image << " twice of " << n << ", key " << key;
        seen[static_cast<std::size_t>(image)] = true;
      }
    }
  }
}

TEST(Permuted, LeavesLittleInPlaceAndKeysDiffer) {
  constexpr std::int64_t kN = 10000;
  std::int64_t in_place = 0, neighbours = 0, equal = 0;
  for (std::int64_t i = 0; i + 1 < kN; ++i) {
    const std::int64_t image = permuted(i, kN, 7);
    in_place += image == i;
    neighbours += permuted(i + 1, kN, 7) == image + 1;
    equal += permuted(i, kN, 8) == image;
  }
  // Of a random permutation each is one on average.
  EXPECT_LT(in_place, 10);
  EXPECT_LT(neighbours, 10);
  EXPECT_LT(equal, 10);
}

TEST(Permuted, WorksOnALargeCorpusWithoutATable) {
  constexpr std::int64_t kN = 1'000'000'000'003;
  std::set<std::int64_t> images;
  for (std::int64_t i = 0; i < 1000; ++i) {
    const std::int64_t image = permuted(i, kN, 3);
    EXPECT_GE(image, 0);
    EXPECT_LT(image, kN);
    images.insert(image);
  }
  EXPECT_EQ(images.size(), 1000U);
  EXPECT_GT(*images.rbegin(), kN / 2);
}

// --- the loader ---

class DataLoaderTest : public ::testing::Test {
 protected:
  /// A store whose token i is i, in documents of these lengths.
  std::shared_ptr<const TokenStore> store(const std::vector<std::int64_t>& lengths) {
    const std::string path = (fresh_folder() / "store.h5").string();
    TokenStoreInfo info;
    info.tokenizer_kind = "external";
    info.tokenizer_hash = "external";
    info.vocab_size = 100000;
    info.recipe = "test";
    TokenStoreWriter out(path, info);
    std::int32_t next = 0;
    for (const std::int64_t length : lengths) {
      Ids document(static_cast<std::size_t>(length));
      std::iota(document.begin(), document.end(), next);
      next += static_cast<std::int32_t>(length);
      out.add_tokens(document);
    }
    out.commit();
    return std::make_shared<TokenStore>(TokenStore::open(path));
  }

  Ids host(const Tensor& t) { return to_host<std::int32_t>(c_.backend(), t); }
  /// The first tokens of a batch's sequences.
  Ids starts(const Batch& b) {
    const Ids tokens = host(b.tokens);
    Ids first;
    for (std::int64_t i = 0; i < b.batch; ++i) first.push_back(tokens[static_cast<std::size_t>(i * b.seq)]);
    return first;
  }

  Context c_{make_cpu_backend({}, 1), DType::F32};
};

TEST_F(DataLoaderTest, SequencesAreWindowsAndTargetsTheNextTokens) {
  const DataLoader data(store({30}), 7, false);
  EXPECT_EQ(data.sequences(), 4);  // 28 tokens, and one more for the last target
  const Batch b = data.in_order(c_, 1, 2);
  Ids expected(14);
  std::iota(expected.begin(), expected.end(), 7);
  EXPECT_EQ(host(b.tokens), expected);
  std::iota(expected.begin(), expected.end(), 8);
  EXPECT_EQ(host(b.targets), expected);
  EXPECT_FALSE(b.document_mask);
  EXPECT_EQ(host(b.positions), (Ids{0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6}));
}

TEST_F(DataLoaderTest, EverySequenceOnceAnEpochInAnotherOrderEach) {
  const DataLoader data(store({700}), 7, false);
  ASSERT_EQ(data.sequences(), 99);
  std::set<Ids> orders;
  for (std::int64_t epoch = 0; epoch < 3; ++epoch) {
    Ids order = starts(data.shuffled(c_, 11, epoch * 99, 99));
    orders.insert(order);
    std::sort(order.begin(), order.end());
    for (std::int32_t i = 0; i < 99; ++i) ASSERT_EQ(order[static_cast<std::size_t>(i)], 7 * i);
  }
  orders.insert(starts(data.shuffled(c_, 12, 0, 99)));
  EXPECT_EQ(orders.size(), 4U) << "an order came twice";
}

TEST_F(DataLoaderTest, OrderDependsOnSeedAndPlaceOnly) {
  const DataLoader data(store({700}), 7, false);
  const DataLoader other(store({700}), 7, false);
  const Ids whole = starts(data.shuffled(c_, 5, 0, 240));  // over two epochs' ends
  EXPECT_EQ(starts(other.shuffled(c_, 5, 0, 240)), whole);
  for (const std::int64_t micro : {1, 2, 3, 8, 48, 80}) {
    Ids parts;
    for (std::int64_t first = 0; first < 240; first += micro) {
      const Ids part = starts(other.shuffled(c_, 5, first, micro));
      parts.insert(parts.end(), part.begin(), part.end());
    }
    EXPECT_EQ(parts, whole) << "micro-batches of " << micro;
  }
  // From the middle, as a resumed run starts.
  EXPECT_EQ(starts(other.shuffled(c_, 5, 100, 140)), Ids(whole.begin() + 100, whole.end()));
}

TEST_F(DataLoaderTest, DocumentsOfEachSequence) {
  const DataLoader data(store({3, 1, 9, 2}), 7, true);  // they start at 0, 3, 4, 13
  ASSERT_EQ(data.sequences(), 2);
  const Batch b = data.in_order(c_, 0, 2);
  EXPECT_TRUE(b.document_mask);
  const Ids documents = host(b.documents);
  // Counted over the batch; the document that reaches into the second sequence is another one there.
  EXPECT_EQ(documents, (Ids{0, 0, 0, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 4}));
  const DataLoader unmasked(store({3, 1, 9, 2}), 7, false);
  EXPECT_EQ(host(unmasked.in_order(c_, 0, 2).documents), (Ids{0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1}));
}

TEST_F(DataLoaderTest, ExactlyOneSequenceIsEnough) {
  EXPECT_EQ(DataLoader(store({8}), 7, false).sequences(), 1);
}

TEST_F(DataLoaderTest, AStoreShorterThanASequenceIsRefused) {
  const auto seven = store({7});
  const std::string text = message_of<UserError>([&] { DataLoader(seven, 7, false); });
  for (const char* word : {"store.h5", "7 tokens", "train.seq_len", "8", "Prepare more text"}) {
    EXPECT_NE(text.find(word), std::string::npos) << text << " lacks " << word;
  }
}

}  // namespace
}  // namespace fathom
