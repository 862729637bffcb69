"""Surgery: how a block, an embedding and a tower learn about time. Nothing here knows timm or open_clip."""
