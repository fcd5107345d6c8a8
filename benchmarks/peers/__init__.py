"""The same segmentation behind other servers, each written as its own documentation would."""
