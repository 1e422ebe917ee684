"""Philox with four words and ten rounds (Salmon et al., SC 2011), straight from the paper, in Python integers."""

CONSTANTS = {  # two multipliers and two increments of the key, by the bits of a word
    32: (0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85),
    64: (0xD2E7470EE14C6C93, 0xCA5A826395121157, 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B),
}


def philox(bits: int, counter: list[int], key: list[int]) -> list[int]:
    """The four words of `bits` bits at a counter of four words, under a key of two."""
    mask, (multiplier_0, multiplier_1, increment_0, increment_1) = (1 << bits) - 1, CONSTANTS[bits]
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = multiplier_0 * c0, multiplier_1 * c2
        c0, c1, c2, c3 = (p1 >> bits) ^ c1 ^ k0, p1 & mask, (p0 >> bits) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + increment_0) & mask, (k1 + increment_1) & mask
    return [c0, c1, c2, c3]
