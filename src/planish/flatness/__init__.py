"""Why a network breaks at low bits, measured on the network itself: errors, curvature, sharpness, damage."""
