"""What each operation means, in the plainest torch that says it. Only tests call these, to hold every path to them."""
